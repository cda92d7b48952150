"""Completions that somebody else drew, all of them (offline) or some of each group (hybrid)."""

from __future__ import annotations

from rebel.config import RebelConfig
from rebel.validate.said import Complaints, said


def offline(config: RebelConfig) -> Complaints:
    """What has no meaning for completions that somebody else drew is left out."""
    share, columns = config.data_completions, config.data_columns
    if config.offline:
        if share or columns:
            yield "--offline draws no completions to put those of --data_columns beside; use one of them"
        if config.eval_against:
            yield (
                f"{said(config, 'eval_against', 'offline')}: nothing is drawn to compare; leave it out, and use "
                "`rebel evaluate` on the result"
            )
        if config.kl_per_iteration is not None:
            yield (
                f"{said(config, 'kl_per_iteration', 'offline')}: a KL is measured on the policy's own completions, "
                "and none are drawn; use --eta"
            )
        if config.track_kl:
            yield "--track_kl with --offline: a KL is measured on the policy's own completions, and none are drawn"
        if config.kl == "shaped" and config.beta:
            yield f"{said(config, 'kl', 'offline')}: at the initial policy no KL is paid yet; use --kl proximal"
        if config.replace_flat_groups:
            yield f"{said(config, 'replace_flat_groups', 'offline')}: nothing is drawn; take such groups out yourself"
    elif share and (config.rounds is not None or config.from_rollouts):
        yield (
            f"{said(config, 'data_completions')}: rounds are of completions that the policy drew; leave out --rounds "
            "and --from_rollouts"
        )
    elif bool(share) != bool(columns):
        yield ("--data_completions says how many of a group come from the data and --data_columns which; give both")
    elif share >= config.num_generations:
        yield (
            f"{said(config, 'data_completions', 'num_generations')} leaves nothing for the policy to draw; use fewer, "
            "or --offline"
        )
