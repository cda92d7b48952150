"""A reward function: how cheerful a text is, by VADER's compound score from -1 to 1 (pip install vaderSentiment)."""

from __future__ import annotations

from typing import Any

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

ANALYZER = SentimentIntensityAnalyzer()


def sentiment(completions: list[Any], **kwargs: Any) -> list[float]:
    """One score for each completion, given as text or as the messages of a chat."""
    texts = [c if isinstance(c, str) else str(c[-1]["content"]) for c in completions]
    return [ANALYZER.polarity_scores(text)["compound"] for text in texts]


# half a text has a sentiment as well, so each stretch of it gets the credit for what it changed
sentiment.judges_beginnings = True  # pyright: ignore[reportFunctionMemberAccess]
