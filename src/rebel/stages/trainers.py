"""`rebel sft` and `rebel reward-model`: TRL's trainers as they are, with this package's settings, data and folders.

What is wrong with the settings or the data is said before a model is loaded. TRL's ping to its makers is not sent.
"""

from __future__ import annotations

import difflib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

import huggingface_hub.constants
import yaml
from datasets import Dataset
from peft import PeftModel
from transformers import AutoConfig, AutoTokenizer, HfArgumentParser, PreTrainedTokenizerBase
from transformers.utils.import_utils import is_torch_bf16_gpu_available
from trl.trainer.model_config import ModelConfig
from trl.trainer.reward_config import RewardConfig
from trl.trainer.reward_trainer import RewardTrainer
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer
from trl.trainer.utils import get_peft_config, get_quantization_config

from rebel.errors import RebelError
from rebel.job import quiet
from rebel.loading import loaded
from rebel.stages.data import Rows, load_stage
from rebel.stages.ending import end_texts
from rebel.stages.settings import REWARD_MODEL, SFT, Stage, StageData

CONFIGS: dict[str, Any] = {SFT.name: SFTConfig, REWARD_MODEL.name: RewardConfig}
TRAINERS: dict[str, Any] = {SFT.name: SFTTrainer, REWARD_MODEL.name: RewardTrainer}
ADAPTER = "adapter"


@dataclass(frozen=True)
class Settings:
    """Everything about one stage: our data, TRL's training arguments and its model arguments."""

    stage: Stage
    given: Mapping[str, Any]
    data: StageData
    training: Any
    model: ModelConfig

    @property
    def name(self) -> str:
        return str(self.model.model_name_or_path)

    @property
    def folder(self) -> Path:
        return Path(self.training.output_dir)


def run_stage(stage: Stage, given: Mapping[str, Any]) -> None:
    """Train, from settings as a YAML file or the command line has them."""
    quiet()
    settings = parsed(stage, given)
    check_folder(settings)
    rows = load_stage(settings.data, getattr(settings.training, "dataset_text_field", "text"))
    tokenizer = tokenizer_for(settings, rows)
    fit_length(settings)
    print(f"data:   {rows}")
    trainer = trainer_of(settings, rows, tokenizer)
    check_lengths(settings, trainer, rows)
    claim(settings)
    resume = settings.training.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if str(resume).lower() == "true" else resume)
    keep(settings, trainer, rows)


# -- settings ------------------------------------------------------------------------------------------------------


def parsed(stage: Stage, given: Mapping[str, Any]) -> Settings:
    """The settings in TRL's own classes; every name or value that is wrong is one error."""
    kinds: Any = (stage.data, CONFIGS[stage.name], ModelConfig)
    given = {**defaults(stage), **given}
    known = {f.name: f for kind in kinds for f in fields(kind) if f.init}
    wrong = [unknown(name, stage, list(known)) for name in given if name not in known]
    if wrong:
        raise RebelError("\n".join(wrong))
    parser = HfArgumentParser(kinds, allow_abbrev=False)
    parser.error = complain  # pyright: ignore[reportAttributeAccessIssue]  # in place of printing usage and exiting
    parser.set_defaults(**{name: None for name, value in given.items() if value is None})
    try:
        data, training, model = parser.parse_args_into_dataclasses(list(words(given)), look_for_args_file=False)
    except RebelError:
        raise
    except (ValueError, TypeError, ImportError) as error:  # what the classes check themselves
        raise RebelError(f"trl refuses these settings: {first_line(error)}") from error
    settings = Settings(stage, given, data, training, model)
    check(settings)
    return settings


def defaults(stage: Stage) -> dict[str, Any]:
    """Where TRL's own default fits neither the command nor this machine."""
    chosen: dict[str, Any] = {"output_dir": stage.output_dir}
    if not is_torch_bf16_gpu_available():
        chosen["bf16"] = False
    if stage is REWARD_MODEL:
        chosen["lora_task_type"] = "SEQ_CLS"
    return chosen


def words(given: Mapping[str, Any]) -> Iterator[str]:
    """The settings as words of a command line, which is what transformers' parser converts with its own rules."""
    for name, value in given.items():
        if isinstance(value, list | tuple):
            yield f"--{name}"
            yield from map(str, value)
        elif isinstance(value, dict):
            yield f"--{name}={json.dumps(value)}"
        elif value is not None:
            yield f"--{name}={str(value).lower() if isinstance(value, bool) else value}"


def complain(message: str) -> NoReturn:
    raise RebelError(message.removeprefix("argument "))


def unknown(name: str, stage: Stage, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean --{near[0]}?" if near else f"it is none of trl's {stage.config} and ModelConfig, nor of ours"
    return f"--{name} is not known; {hint}"


def check(settings: Settings) -> None:
    """What can be wrong before anything is loaded."""
    complaints = []
    if not settings.model.model_name_or_path:
        complaints.append("no model: give --model_name_or_path a Hugging Face name or a folder")
    if not settings.data.dataset_name:
        complaints.append("no data: give --dataset_name a hub name, a folder or a file")
    if str(settings.training.eval_strategy.value) != "no" and not (
        settings.data.dataset_test_split or settings.data.eval_rows
    ):
        complaints.append("--eval_strategy without rows to evaluate on: give --dataset_test_split or --eval_rows")
    quantized = settings.model.load_in_4bit or settings.model.load_in_8bit
    if quantized and settings.stage is REWARD_MODEL:
        complaints.append("--load_in_4bit and --load_in_8bit leave an adapter, which no --reward_funcs loads")
    if quantized and not settings.model.use_peft:
        complaints.append("quantized weights cannot be trained themselves; add --use_peft")
    if complaints:
        raise RebelError("\n".join(complaints))


# -- the folder ----------------------------------------------------------------------------------------------------


def leftovers(folder: Path) -> list[Path]:
    """What a stage, or another run, has written into the folder."""
    names = ("*.safetensors*", "config.json", "adapter_config.json", "checkpoint-*", ADAPTER)
    records = [folder / name for name in (SFT.record, REWARD_MODEL.record, "config.yaml", "metrics.jsonl")]
    return [path for name in names for path in folder.glob(name)] + [path for path in records if path.exists()]


def check_folder(settings: Settings) -> None:
    """Raises RebelError where the output folder may not be written to."""
    folder = settings.folder
    if folder.exists() and not folder.is_dir():
        raise RebelError(f"--output_dir {folder} is a file; name a folder")
    if folder.resolve() == Path(settings.name).expanduser().resolve():
        raise RebelError(f"--output_dir {folder} is the model's own folder; the trained model would replace it")
    resume = settings.training.resume_from_checkpoint
    if resume and str(resume).lower() == "true" and not list(folder.glob("checkpoint-*")):
        raise RebelError(f"--resume_from_checkpoint: --output_dir {folder} has no checkpoint to go on from")
    if resume or not leftovers(folder):
        return
    if not settings.data.overwrite_output_dir:
        raise RebelError(f"--output_dir {folder} holds another run: add --overwrite_output_dir, or name another")
    if not (folder / settings.stage.record).exists():
        raise RebelError(f"--output_dir {folder} was not made by rebel {settings.stage.name}; name another folder")


def claim(settings: Settings) -> None:
    """Make the folder ready, and note the settings in it."""
    if settings.training.process_index != 0:
        return
    folder = settings.folder
    if not settings.training.resume_from_checkpoint:
        for old in leftovers(folder):
            shutil.rmtree(old) if old.is_dir() else old.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / settings.stage.record).write_text(yaml.safe_dump(dict(settings.given), sort_keys=False))


# -- model and tokenizer -------------------------------------------------------------------------------------------


def tokenizer_for(settings: Settings, rows: Rows) -> PreTrainedTokenizerBase:
    """The tokenizer of the model, once it is known that both can be loaded and that the rows suit them."""
    name, training = settings.name, settings.training
    init = training.model_init_kwargs if isinstance(training.model_init_kwargs, dict) else {}
    source: dict[str, Any] = {
        "revision": init.get("revision", settings.model.model_revision),
        "trust_remote_code": training.trust_remote_code,
    }
    tokenizer = loaded(name, "tokenizer", partial(AutoTokenizer.from_pretrained, name, **source))
    loaded(name, "configuration", partial(AutoConfig.from_pretrained, name, **source))
    if training.eos_token is None and tokenizer.eos_token is None:
        raise RebelError(f"the tokenizer of {name} has no token for the end of a text; name one by --eos_token")
    if rows.chat and tokenizer.chat_template is None and training.chat_template_path is None:
        raise RebelError(
            f"the rows are chat messages, but the tokenizer of {name} has no chat template: use a chat model, "
            "give --chat_template_path, or rows of plain text"
        )
    if settings.stage is REWARD_MODEL and not rows.chat:
        with TemporaryDirectory() as folder:  # now, since after the training it would be too late
            end_texts(deepcopy(tokenizer), Path(folder), training.eos_token)
    return tokenizer


def fit_length(settings: Settings) -> None:
    """Rows are no longer than the model has positions for, unless a length is given."""
    config = AutoConfig.from_pretrained(settings.name, trust_remote_code=settings.training.trust_remote_code)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    asked = settings.training.max_length
    if positions and asked and asked > positions and "max_length" in settings.given:
        raise RebelError(f"--max_length {asked}: the model has {positions:,} positions; use at most that")
    settings.training.max_length = min((limit for limit in (asked, positions) if limit), default=None)


def trainer_of(settings: Settings, rows: Rows, tokenizer: PreTrainedTokenizerBase) -> Any:
    """TRL's trainer, with the model loaded and the rows in tokens."""
    given, training = settings.model, settings.training
    training.model_init_kwargs = {
        "revision": given.model_revision,
        "attn_implementation": given.attn_implementation,
        "dtype": given.dtype,
        **(training.model_init_kwargs or {}),
    }
    try:
        with without_telemetry():
            return TRAINERS[settings.stage.name](
                model=settings.name,
                args=training,
                train_dataset=rows.train,
                eval_dataset=rows.evaluation,
                processing_class=tokenizer,
                quantization_config=get_quantization_config(given),
                peft_config=get_peft_config(given),
            )
    except Exception as error:  # of many kinds: weights, precision, LoRA's layer names, templates
        name = TRAINERS[settings.stage.name].__name__
        raise RebelError(f"trl's {name} refuses the model or the rows: {first_line(error)}") from error


@contextmanager
def without_telemetry() -> Iterator[None]:
    """What HF_HUB_DISABLE_TELEMETRY=1 does, also where huggingface_hub has read the environment already."""
    before = huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY
    huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True
    try:
        yield
    finally:
        huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = before


def check_lengths(settings: Settings, trainer: Any, rows: Rows) -> None:
    """Say what --max_length left out or cut."""
    longest, left = settings.training.max_length, trainer.train_dataset
    if longest is None:
        return
    if settings.stage is REWARD_MODEL:
        dropped = len(rows.train) - len(left)
        if not len(left):
            raise RebelError(f"every one of the {dropped} pairs is longer than --max_length {longest} tokens; raise it")
        if dropped:
            print(
                f"        {dropped:,} of {len(rows.train):,} pairs left out: longer than --max_length {longest} tokens"
            )
    elif not settings.training.packing and isinstance(left, Dataset):
        cut = sum(len(ids) >= longest for ids in left["input_ids"])
        if cut:
            print(f"        {cut:,} of {len(left):,} rows cut to --max_length {longest} tokens")


# -- the result ----------------------------------------------------------------------------------------------------


def keep(settings: Settings, trainer: Any, rows: Rows) -> None:
    """Write model and tokenizer as `rebel train` loads them, and say how training ended."""
    adapter = save(settings, trainer)
    if settings.training.process_index == 0:
        if settings.stage is REWARD_MODEL and not rows.chat:
            end_texts(trainer.processing_class, settings.folder)
        trainer.state.save_to_json(str(settings.folder / "trainer_state.json"))
        print(f"result: {outcome(trainer.state.log_history)}")
        print(f"model:  {settings.folder}" + (f" (an adapter: --model_name_or_path {settings.name}" if adapter else ""))
        if adapter:
            print(f"        --adapter_path {settings.folder})")
    if settings.training.push_to_hub:
        trainer.push_to_hub(dataset_name=settings.data.dataset_name)


def save(settings: Settings, trainer: Any) -> bool:
    """Write the model; whether it had to stay an adapter, since quantized weights cannot take it in."""
    folder = settings.folder
    quantized = settings.model.load_in_4bit or settings.model.load_in_8bit
    model = trainer.accelerator.unwrap_model(trainer.model)
    if not isinstance(model, PeftModel) or quantized:
        trainer.save_model(str(folder))
        return quantized
    trainer.save_model(str(folder / ADAPTER))
    if settings.training.process_index == 0:
        model.merge_and_unload().save_pretrained(str(folder))  # pyright: ignore[reportCallIssue]
        trainer.processing_class.save_pretrained(str(folder))
    return False


def outcome(history: Sequence[Mapping[str, float]]) -> str:
    """First and last value of what was logged, in words."""
    said = []
    for name in ("loss", "accuracy", "mean_token_accuracy", "eval_loss", "eval_accuracy"):
        values = [row[name] for row in history if name in row]
        if values:
            said.append(f"{name} {values[0]:.3f}" + (f" to {values[-1]:.3f}" if len(values) > 1 else ""))
    return ", ".join(said) or "nothing was logged; lower --logging_steps"


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
