"""Settings -> objects: the one module that knows every class."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    get_scheduler,
)

from rebel.build_offline import Rows, build_groups, describe_offline, offline_parts
from rebel.build_online import PAIRINGS, Parts, online_parts
from rebel.build_win_rates import win_rates
from rebel.config import RebelConfig
from rebel.data import load_prompts, that_fit
from rebel.errors import RebelError
from rebel.fit import Regression
from rebel.iterates import FOLDER as ITERATES
from rebel.iterates import Iterates
from rebel.judging import judge_of_evaluation
from rebel.large_batch import in_rounds, iterations_of_rounds, round_size, whose
from rebel.learner import Learner, learner
from rebel.loading import loaded
from rebel.model_card import model_card
from rebel.plan import Memory, describe, estimate, layout_in_words
from rebel.policies.causal_lm import CausalLM, LanguageModel, causal_lm, frozen_copy, initial_adapter, without_adapter
from rebel.record import Recorder
from rebel.recorded import Groups
from rebel.report import Terminal
from rebel.rewards.combine import Weighted
from rebel.rewards.functions import Notes
from rebel.rewards.load import as_reward
from rebel.rollouts import Prompts
from rebel.trackers import Trackers, training_arguments
from rebel.train import Hooks, Run
from rebel.types import Judge, LogProb, Prompt


def build_accelerator(config: RebelConfig) -> Accelerator:
    """Devices, processes and precision of this run. Sharded weights are refused: sampling needs them whole."""
    if config.fp16 and not torch.cuda.is_available():
        raise RebelError("--fp16 needs a CUDA device, and there is none; use --bf16, or neither")
    precision = "bf16" if config.bf16 else "fp16" if config.fp16 else "no"
    whole = GradientAccumulationPlugin(num_steps=1)  # else a launcher's setting would scale the gradient
    accelerator = Accelerator(cpu=config.use_cpu, mixed_precision=precision, gradient_accumulation_plugin=whole)
    if str(accelerator.distributed_type.value) in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "TP"):
        raise RebelError(
            f"accelerate is set up for {accelerator.distributed_type.value}; this version trains with one process "
            "or several that each hold the whole model (MULTI_GPU, MULTI_CPU): choose that in `accelerate config`"
        )
    return accelerator


def build_model(config: RebelConfig) -> LanguageModel:
    """The model of --model_name_or_path, with its adapter if one is asked for."""
    name = str(config.model_name_or_path)
    settings: dict[str, Any] = {"trust_remote_code": config.trust_remote_code, "dtype": weight_type(config)}
    if config.attn_implementation:
        settings["attn_implementation"] = config.attn_implementation
    if config.load_in_4bit:
        settings["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = loaded(name, "model", partial(AutoModelForCausalLM.from_pretrained, name, **settings))
    return with_adapter(model, config) if config.use_peft or config.adapter_path else model


def weight_type(config: RebelConfig) -> str | torch.dtype:
    """fp32 for weights that are trained whole (small steps vanish in bf16); frozen ones as they were saved."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    return "auto" if config.use_peft or config.adapter_path else torch.float32


def build_tokenizer(config: RebelConfig) -> PreTrainedTokenizerBase:
    name = str(config.model_name_or_path)
    load = partial(AutoTokenizer.from_pretrained, name, trust_remote_code=config.trust_remote_code)
    return loaded(name, "tokenizer", load)


def with_adapter(model: PreTrainedModel, config: RebelConfig, lora: PeftConfig | None = None) -> PeftModel:
    """The model with a new LoRA adapter, or with the one of --adapter_path to go on from."""
    if config.load_in_4bit:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=config.gradient_checkpointing)
    if config.adapter_path:
        return PeftModel.from_pretrained(model, config.adapter_path, is_trainable=True)
    names = config.lora_target_modules
    targets = names[0] if names == ["all-linear"] else names
    lora = lora or LoraConfig(
        r=config.lora_r, lora_alpha=config.lora_alpha, lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM"
    )
    return get_peft_model(model, lora)


def build_policy(model: LanguageModel, tokenizer: PreTrainedTokenizerBase, config: RebelConfig) -> CausalLM:
    policy = causal_lm(model, tokenizer, config.temperature, config.chat_template_kwargs)
    if config.gradient_checkpointing:  # whose layers take no keys and values from a pass before
        policy.bare.causal.gradient_checkpointing_enable({"use_reentrant": False})
    shared = policy.shared_prefix and config.shared_prefix and not config.gradient_checkpointing
    return replace(policy, shared_prefix=shared)


def build_reference(policy: CausalLM, config: RebelConfig) -> LogProb | None:
    """log pi_ref, or None where nothing asks for it: beta 0 and no KL to measure."""
    adapter = isinstance(policy.model, PeftModel)
    wanted = adapter if config.track_kl is None else config.track_kl
    if not config.beta and not wanted:
        return None
    kind = config.reference
    if kind == "auto":
        kind = "model" if not adapter else "initial_adapter" if config.adapter_path else "base"
    if kind != "model" and not adapter:
        raise RebelError(f"--reference {kind} needs an adapter; use --use_peft, or --reference model")
    return {"model": frozen_copy, "base": without_adapter, "initial_adapter": initial_adapter}[kind](policy)


def build_prompts(config: RebelConfig) -> tuple[list[Prompt], list[Prompt]]:
    """(training, evaluation) prompts as the settings name them."""
    load = partial(load_prompts, str(config.dataset_name), column=config.prompt_column, config=config.dataset_config)
    prompts = load(split=config.dataset_train_split)
    if not config.eval_prompts:
        return prompts, []
    if config.dataset_test_split:
        return prompts, load(split=config.dataset_test_split)[: config.eval_prompts]
    if len(prompts) <= config.eval_prompts:
        raise RebelError(
            f"--eval_prompts {config.eval_prompts} leaves none of the {len(prompts)} prompts for training; "
            "lower it, or name a --dataset_test_split"
        )
    return prompts[config.eval_prompts :], prompts[: config.eval_prompts]


def fitting(prompts: Sequence[Prompt], policy: CausalLM, config: RebelConfig) -> tuple[list[Prompt], int]:
    """The prompts that leave room for a completion, and the number of those that do not."""
    check_template(prompts, policy)
    positions = getattr(policy.bare.causal.config.get_text_config(), "max_position_embeddings", None) or math.inf
    room = min(config.max_prompt_length, positions - config.max_completion_length)
    if room < 1:
        raise RebelError(
            f"--max_completion_length {config.max_completion_length} leaves no room for a prompt: the model has "
            f"{positions} positions"
        )
    longest = int(room) + config.max_completion_length
    if longest > config.tokens_per_micro_batch:
        raise RebelError(
            f"--tokens_per_micro_batch {config.tokens_per_micro_batch} is less than one completion may need "
            f"({longest} = prompt and completion); raise it, or lower --max_prompt_length"
        )
    return that_fit(prompts, policy.encode, int(room))


def check_template(prompts: Sequence[Prompt], policy: CausalLM) -> None:
    if policy.tokenizer.chat_template is None and any(not isinstance(p.content, str) for p in prompts):
        raise RebelError(
            "the prompts are chat messages, but the tokenizer has no chat template: use a chat model, add a "
            "chat_template.jinja to its folder, or give prompts of plain text"
        )


def memory_of_average(config: RebelConfig) -> float:
    """Averaging pays where iterates come to rest, and lags behind where they keep moving."""
    if config.average is None:
        return 0.3 if config.beta and not config.mixture else 0.0
    return config.average


def build_learner(
    accelerator: Accelerator, policy: CausalLM, config: RebelConfig, arguments: TrainingArguments, steps: int
) -> Learner:
    """The learner with the optimiser and schedule of these names."""

    def optimizer(weights: list[Tensor]) -> torch.optim.Optimizer:
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(arguments)
        return kind(weights, weight_decay=config.weight_decay, **settings)

    warmup = config.warmup_steps
    schedule = partial(
        get_scheduler,
        config.lr_scheduler_type,
        num_warmup_steps=int(warmup if warmup >= 1 else warmup * steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=config.lr_scheduler_kwargs or None,
    )
    return learner(
        accelerator,
        policy,
        optimizer,
        lambda optimizer: schedule(optimizer=optimizer),
        budget=config.tokens_per_micro_batch,
        max_grad_norm=config.max_grad_norm,
        average=memory_of_average(config),
    )


def build_run(config: RebelConfig, learner: Learner, reference: LogProb | None, parts: Parts, hooks: Hooks) -> Run:
    """A run over the parts."""
    regression = Regression(
        steps=config.steps_per_iteration,
        passes=config.passes,
        pairing=PAIRINGS[config.pairing],
        step_rule=parts.step_rule,
        beta=config.beta,
        held_out=config.held_out if config.early_stop else 0.0,
    )
    return Run(
        learner=learner,
        collector=parts.collector,
        regression=regression,
        reference=reference,
        evaluator=parts.evaluator,
        max_failed=config.max_failed_rewards,
        seed=config.seed,
        hooks=hooks,
    )


def iterations_of(config: RebelConfig, training: Sequence[Prompt] | Groups) -> int:
    """Iterations of the run, from --rounds, --iterations, --num_train_epochs or --max_steps."""
    if in_rounds(config) and not isinstance(training, Groups):
        return iterations_of_rounds(config, round_size(config, training))
    if config.iterations is not None:
        return config.iterations
    if config.num_train_epochs is not None:
        return math.ceil(config.num_train_epochs * len(training) / config.prompts_per_iteration)
    return math.ceil(config.max_steps / (config.steps_per_iteration * config.passes))


@dataclass
class Job:
    """A run with what keeps its record: ready to be carried out."""

    config: RebelConfig
    run: Run
    recorder: Recorder
    iterations: int
    plan: list[str]
    parts: Parts


Data = tuple[Sequence[Prompt], Sequence[Prompt]] | tuple[Rows, Rows | None]
"""What to train and to evaluate on: prompts, or offline rows with completions."""


def build_job(
    config: RebelConfig,
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    reward: Callable[[Notes], Weighted | None],
    data: Data,
    callbacks: Sequence[Any] = (),
) -> Job:
    """All parts of a run from its settings and what has been loaded. Touches no file.

    Only where everything is scored already and nothing is evaluated by reward can it do without one.
    """
    arguments = training_arguments(config)  # before the accelerator, whose state it would reset
    accelerator = build_accelerator(config)
    policy = build_policy(model.to(accelerator.device), tokenizer, config)
    material = encoded(data, policy, config)
    # offline the anchor is the initial policy, and there are no completions of the policy's own to measure a KL on
    reference = None if config.offline else build_reference(policy, config)
    iterations = iterations_of(config, material.training)
    mover = build_learner(
        accelerator, policy, config, arguments, iterations * config.steps_per_iteration * config.passes
    )
    main, folder = accelerator.is_main_process, Path(config.output_dir)
    trackers = Trackers(callbacks, arguments, policy.model, tokenizer, mover.optimizer, mover.scheduler, main)
    terminal = build_terminal(config, iterations, main)
    notes = Notes(trainer_state=trackers.state)
    iterates = build_iterates(policy, config, iterations)
    recorder = Recorder(
        config,
        folder,
        terminal,
        trackers,
        mover,
        partial(save_model, config, mover),
        len(material.training),
        notes.take_metrics,
        iterates=iterates,
    )
    parts = material.parts(config, mover, reward(notes), notes, iterates, terminal.say)
    recorder.round = parts.per_round
    run = build_run(config, mover, reference, parts, recorder)
    memory = estimate(policy.model, config, reference_is_copy(reference, policy, config), mover.average > 0)
    plan = material.plan(config, parts, iterations, accelerator.num_processes, memory, policy.shared_prefix)
    return Job(config, run, recorder, iterations, [*plan, *parts.notes, *material.notes], parts)


def build_terminal(config: RebelConfig, iterations: int, main: bool) -> Terminal:
    """The table of the run."""
    return Terminal(
        iterations,
        disable=config.disable_tqdm,
        silent=not main,
        judged=bool(config.eval_against),
        offline=config.offline,
    )


@dataclass(frozen=True, slots=True)
class Material:
    """What a run is trained and evaluated on, prompts or groups, in tokens that fit; `dropped` did not."""

    training: Sequence[Prompt] | Groups
    held_out: Any
    dropped: int = 0
    notes: tuple[str, ...] = ()

    def parts(
        self,
        config: RebelConfig,
        learner: Learner,
        reward: Weighted | None,
        notes: Notes,
        iterates: Iterates | None,
        say: Callable[[str], None],
    ) -> Parts:
        """The parts that take their groups from it."""
        if isinstance(self.training, Groups):
            held_out = self.held_out if isinstance(self.held_out, Groups) else None
            return offline_parts(self.training, held_out, learner, config, PAIRINGS[config.pairing], reward, say)
        held = () if isinstance(self.held_out, Groups) else self.held_out
        seen = held if isinstance(self.training, Prompts) else self.training  # by the reward
        if reward and seen:
            reward.check(seen)
        judge: Judge | None = judge_of_evaluation(config, notes, held)
        return online_parts(config, learner, reward, (self.training, held), judge, iterates, say)

    def plan(
        self, config: RebelConfig, parts: Parts, iterations: int, world: int, memory: Memory, shared: bool
    ) -> list[str]:
        """The plan of the run in words."""
        layout = layout_in_words(config, shared)
        if parts.recordings:
            return describe_offline(config, parts.recordings, self.dropped, iterations, world, memory, layout)
        return describe(config, len(self.training), len(self.held_out), self.dropped, iterations, world, memory, layout)


def encoded(data: Data, policy: CausalLM, config: RebelConfig) -> Material:
    """The prompts, or the groups of the rows, that fit into the lengths."""
    if isinstance(data[0], Rows):
        held_out = build_groups(data[1], policy, config) if isinstance(data[1], Rows) else ()
        return Material(build_groups(data[0], policy, config), held_out, data[0].shared)
    held = fitting(data[1], policy, config)[0] if data[1] else []  # pyright: ignore[reportArgumentType]
    if isinstance(data[0], Prompts):
        return Material(data[0], held, notes=tuple(whose(config, data[0].rollouts, policy)))
    training, dropped = fitting(data[0], policy, config)
    return Material(training, held, dropped)


def build_iterates(policy: CausalLM, config: RebelConfig, iterations: int) -> Iterates | None:
    """The store of the iterates of a mixture, or None where none is asked for."""
    if not config.mixture:
        return None
    trained = {name: weight for name, weight in policy.model.named_parameters() if weight.requires_grad}
    return Iterates(Path(config.output_dir) / ITERATES, trained, config.mixture, iterations)


def reference_is_copy(reference: LogProb | None, policy: CausalLM, config: RebelConfig) -> bool:
    return reference is not None and (config.reference == "model" or not isinstance(policy.model, PeftModel))


def save_model(config: RebelConfig, learner: Learner, folder: Path) -> None:
    """Write the policy (its average, if one is kept) as Hugging Face loads it, with tokenizer and model card."""
    policy = learner.policy
    assert isinstance(policy, CausalLM), "build_policy made it"
    folder.mkdir(parents=True, exist_ok=True)
    with learner.use_average():
        names: dict[str, Any] = {"selected_adapters": ["default"]} if isinstance(policy.model, PeftModel) else {}
        policy.model.save_pretrained(str(folder), **names)
    policy.tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(model_card(config, learner))


def build_reward(config: RebelConfig, notes: Notes, rewards: Sequence[Any] | None = None) -> Weighted:
    """The weighted sum of the rewards of the settings, or of these objects, and of the win rate that a judge gives."""
    given = config.reward_funcs if rewards is None else rewards
    models = {"trust_remote_code": config.trust_remote_code, **({"device": "cpu"} if config.use_cpu else {})}
    found = [as_reward(reward, notes, **models) for reward in given]
    return Weighted([*found, *win_rates(config, notes, models)], config.reward_weights)


def reward_if_any(config: RebelConfig, notes: Notes, rewards: Sequence[Any] | None = None) -> Weighted | None:
    """The reward, or None where none is given and all is scored already: offline, or with rollouts drawn before."""
    given = config.reward_funcs if rewards is None else rewards
    scored = config.offline or config.from_rollouts
    return None if scored and not given and not config.judge else build_reward(config, notes, rewards)
