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

from rebel.build_offline import Parts, Recordings, Rows, build_groups, describe_offline, hybrid, offline_parts
from rebel.collect import Online, Source
from rebel.config import RebelConfig
from rebel.data import PromptStream, load_prompts, that_fit
from rebel.errors import RebelError
from rebel.evaluators import ByReward
from rebel.fit import Regression
from rebel.learner import Learner, learner
from rebel.model_card import model_card
from rebel.pairing import all_pairs, best_against_worst, random_pairs
from rebel.plan import Memory, describe, estimate, iterations_of
from rebel.policies.causal_lm import CausalLM, LanguageModel, causal_lm, frozen_copy, initial_adapter, without_adapter
from rebel.record import Recorder
from rebel.recorded import Groups
from rebel.report import Terminal
from rebel.rewards.combine import Weighted
from rebel.rewards.functions import Notes
from rebel.rewards.load import as_reward
from rebel.samplers.generate import Generate
from rebel.stepsize import AutoEta, GivenEta, StepRule
from rebel.trackers import Trackers, training_arguments
from rebel.train import Hooks, Run
from rebel.types import LogProb, Pairing, Prompt, Reward

PAIRINGS: dict[str, Pairing] = {"all": all_pairs, "extremes": best_against_worst, "random": random_pairs}


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


def loaded(name: str, what: str, load: Callable[[], Any]) -> Any:
    """What transformers loads, or an error in one line."""
    if name.startswith((".", "/", "~")) and not Path(name).expanduser().exists():
        raise RebelError(f"--model_name_or_path {name}: there is no such folder")
    try:
        return load()
    except Exception as error:  # of many kinds: files, network, configuration
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RebelError(f"--model_name_or_path {name}: its {what} cannot be loaded: {reason}") from error


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
    if config.gradient_checkpointing:
        policy.bare.causal.gradient_checkpointing_enable({"use_reentrant": False})
    return policy


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
        return 0.3 if config.beta else 0.0
    return config.average


def build_step_rule(config: RebelConfig) -> StepRule:
    if config.eta == "auto":
        return AutoEta(config.beta, config.kl_per_iteration)
    return GivenEta(float(config.eta), config.beta, config.kl)


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


def online_parts(
    config: RebelConfig, learner: Learner, reward: Reward, prompts: tuple[Sequence[Prompt], Sequence[Prompt]]
) -> Parts:
    """Groups drawn from the policy, which is evaluated by the reward of what it draws."""
    accelerator, policy = learner.accelerator, learner.policy
    assert isinstance(policy, CausalLM), "build_policy made it"
    precision: Any = accelerator.autocast  # whose annotation contradicts its default
    sampler = Generate(policy, config.max_completion_length, config.temperature, precision)
    drawing, *notes = hybrid(sampler, prompts[0], policy, config) if config.data_completions else (sampler,)
    source = Source(
        sampler=drawing,
        reward=reward,
        stream=PromptStream(prompts[0], config.seed),
        group_size=config.num_generations,
        chunk=max(1, config.sampling_batch // config.num_generations),
        penalty=config.missing_eos_penalty or 0.0,
        drop_unfinished=config.drop_truncated,
        scale=config.scale_rewards,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
    )
    heat = config.temperature if config.eval_temperature is None else config.eval_temperature
    evaluation = replace(
        source,
        sampler=replace(sampler, temperature=heat),
        group_size=config.eval_generations,
        chunk=max(1, config.sampling_batch // config.eval_generations),
    )
    return Parts(
        collector=Online(source, config.prompts_per_iteration, config.replace_flat_groups),
        evaluator=ByReward(evaluation, prompts[1]) if prompts[1] else None,
        step_rule=build_step_rule(config),
        notes=tuple(notes),
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


@dataclass
class Job:
    """A run with what keeps its record: ready to be carried out."""

    config: RebelConfig
    run: Run
    recorder: Recorder
    reward: Reward | None
    iterations: int
    plan: list[str]
    recordings: tuple[Recordings, ...] = ()


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
    """All parts of a run from its settings and what has been loaded. Touches no file."""
    arguments = training_arguments(config)  # before the accelerator, whose state it would reset
    accelerator = build_accelerator(config)
    policy = build_policy(model.to(accelerator.device), tokenizer, config)
    material = encoded(data, policy, config)
    # offline the anchor is the initial policy, and there are no completions of the policy's own to measure a KL on
    reference = None if config.offline else build_reference(policy, config)
    iterations = iterations_of(config, len(material.training))
    steps = iterations * config.steps_per_iteration * config.passes
    mover = build_learner(accelerator, policy, config, arguments, steps)
    main = accelerator.is_main_process
    trackers = Trackers(callbacks, arguments, policy.model, tokenizer, mover.optimizer, mover.scheduler, main)
    terminal = Terminal(iterations, disable=config.disable_tqdm, silent=not main, offline=config.offline)
    notes = Notes(trainer_state=trackers.state)
    judge = reward(notes)
    save, folder, count = partial(save_model, config, mover), Path(config.output_dir), len(material.training)
    recorder = Recorder(config, folder, terminal, trackers, mover, save, count, notes.take_metrics)
    parts = material.parts(config, mover, judge, terminal.say)
    run = build_run(config, mover, reference, parts, recorder)
    memory = estimate(policy.model, config, reference_is_copy(reference, policy, config), mover.average > 0)
    plan = material.plan(config, parts, iterations, accelerator.num_processes, memory)
    return Job(config, run, recorder, judge, iterations, [*plan, *parts.notes], parts.recordings)


@dataclass(frozen=True, slots=True)
class Material:
    """What a run is trained and evaluated on, prompts or groups, in tokens that fit; `dropped` did not."""

    training: Sequence[Prompt] | Groups
    held_out: Any
    dropped: int = 0

    def parts(self, config: RebelConfig, learner: Learner, reward: Weighted | None, say: Callable) -> Parts:
        """The parts that take their groups from it."""
        if isinstance(self.training, Groups):
            pairing = PAIRINGS[config.pairing]
            return offline_parts(self.training, self.held_out or None, learner, config, pairing, reward, say)
        assert reward is not None, "what is drawn has to be scored"
        reward.check(self.training)
        return online_parts(config, learner, reward, (self.training, self.held_out))

    def plan(self, config: RebelConfig, parts: Parts, iterations: int, world: int, memory: Memory) -> list[str]:
        """The plan of the run in words."""
        if parts.recordings:
            return describe_offline(config, parts.recordings, self.dropped, iterations, world, memory)
        return describe(config, len(self.training), len(self.held_out), self.dropped, iterations, world, memory)


def encoded(data: Data, policy: CausalLM, config: RebelConfig) -> Material:
    """The prompts, or the groups of the rows, that fit into the lengths."""
    training, held_out = data
    if isinstance(training, Rows):
        groups = build_groups(training, policy, config)
        return Material(
            groups, build_groups(held_out, policy, config) if isinstance(held_out, Rows) else (), training.shared
        )
    kept, dropped = fitting(training, policy, config)
    others: Any = held_out  # prompts too
    return Material(kept, fitting(others, policy, config)[0] if others else [], dropped)


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


def build_reward(config: RebelConfig, notes: Notes, rewards: Sequence[Any] | None = None) -> Weighted | None:
    """The weighted sum of the rewards of the settings, or of these objects; offline there may be none."""
    given = config.reward_funcs if rewards is None else rewards
    if config.offline and not given:
        return None
    models = {"trust_remote_code": config.trust_remote_code, **({"device": "cpu"} if config.use_cpu else {})}
    return Weighted([as_reward(reward, notes, **models) for reward in given], config.reward_weights)
