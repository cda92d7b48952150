"""Every setting of a run, with its default and its meaning. Imports no torch, so that `rebel --help` answers at once.

Names are TRL's where the meaning is TRL's. The docstring under a field is its help text on the command line.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from rebel.elsewhere import explaining


@explaining
@dataclass(frozen=True)
class RebelConfig:
    # -- model ---------------------------------------------------------------------------------------------
    model_name_or_path: str | None = None
    """Hugging Face name or folder of the causal language model to tune."""
    pipeline_name_or_path: str | None = None
    """Hugging Face name or folder of the pipeline of diffusers to tune, in place of a language model."""
    dtype: str = "auto"
    """Type of the weights: float32, bfloat16, float16, or auto: fp32 if trained whole, as saved below an adapter.
    For a pipeline, auto is bfloat16 below an adapter on a GPU, and float32 otherwise."""
    attn_implementation: str | None = None
    """Attention of transformers: sdpa, eager, flash_attention_2, ...; flex_attention packs rows on a GPU."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless you ask for it."""
    use_peft: bool | None = None
    """Train a LoRA adapter instead of all weights; the reference is then the model without it, at no cost.
    Unset: for a pipeline only."""
    lora_r: int = 16
    """Rank of the adapter."""
    lora_alpha: int = 32
    """Scale of the adapter."""
    lora_target_modules: list[str] = field(default_factory=lambda: ["all-linear"])
    """Names of the layers that get an adapter."""
    adapter_path: str | None = None
    """A trained adapter to go on from."""
    load_in_4bit: bool = False
    """QLoRA: 4-bit weights below the adapter (needs bitsandbytes)."""
    reference: Literal["auto", "base", "initial_adapter", "model"] = "auto"
    """The initial policy: base (adapter off), initial_adapter (frozen copy of it) or model (frozen copy of all)."""
    track_kl: bool | None = None
    """Measure the KL to the initial policy also with beta 0. Unset: only where the reference costs no second model."""

    # -- data ----------------------------------------------------------------------------------------------
    dataset_name: str | None = None
    """Prompts: a hub name, a folder, or a .jsonl, .json, .csv, .parquet or .txt file."""
    dataset_config: str | None = None
    """Configuration of a hub dataset."""
    dataset_train_split: str = "train"
    """Split with the prompts of training."""
    dataset_test_split: str | None = None
    """Split with the prompts of evaluation. Unset: the first `eval_prompts` rows are kept out of training for it."""
    prompt_column: str = "prompt"
    """Column with the prompts: text, or chat messages. The other columns reach the reward functions by name."""
    eval_prompts: int = 64
    """How many prompts to evaluate on; 0 for none."""
    max_prompt_length: int = 512
    """Longest prompt in tokens. Longer ones are dropped and counted, never cut."""
    data_completions: int = 0
    """Hybrid: how many of the num_generations come from the data instead of the policy."""
    data_columns: list[str] = field(default_factory=list)
    """Hybrid: columns with those completions, each a text, messages, or a list of such."""

    # -- offline data --------------------------------------------------------------------------------------
    offline: bool = False
    """Learn from the completions in the data and draw none; pi_t of the regression is the initial policy throughout."""
    data_format: Literal["auto", "preferences", "groups", "comparisons"] = "auto"
    """Unset: by the columns: chosen and rejected; completions and rewards; completions and comparisons."""
    margin_column: str | None = None
    """Column of the margins (preferences), rewards (groups) or comparisons. Unset: margin, rewards, comparisons."""
    margin_type: Literal["margin", "probability", "votes"] = "margin"
    """What that column has: margins, or P(better) or votes, of which the margin is the clipped logit in nats."""
    constant_margin: float = 1.0
    """Margin of chosen over rejected where there is neither such a column nor a reward function."""
    margin_clip: float = 3.0
    """Largest margin that a probability or votes give, in nats."""
    anchor_cache_dir: str | None = None
    """Where log-probabilities of the initial policy are kept. Unset: the folder anchors in output_dir."""

    # -- rewards -------------------------------------------------------------------------------------------
    reward_funcs: list[str] = field(default_factory=list)
    """Each: file.py:function, package.module:function, a name of trl.rewards, or a reward model's name or folder."""
    reward_weights: list[float] | None = None
    """One weight for each reward function; 1 each if unset."""
    scale_rewards: Literal["none", "group", "batch"] = "none"
    """Divide rewards by their standard deviation over the group or the iteration. Changes the unit of eta and beta."""
    max_failed_rewards: float = 0.1
    """Stop when more than this share of an iteration's completions got no usable reward."""

    # -- preferences ---------------------------------------------------------------------------------------
    judge: str | None = None
    """Reward win rates: file.py:function, package.module:function, openai:MODEL, a table (.json), a model's folder or
    name. With reward_funcs it is one more of the weighted rewards, the last."""
    judge_unit: Literal["win_rate", "advantage"] = "win_rate"
    """Unit of that reward: the win rate against the policy, or 2 * win rate - 1, which doubles eta."""
    judge_opponents: Literal["group", "shared"] = "group"
    """Compare with all of the group, or with one of it that all share: fewer comparisons, more noise."""
    judge_swap: bool = True
    """Ask for both orders of a pair and take the mean; measures how far the judge contradicts itself."""
    judge_template: str | None = None
    """File with what a language model is asked: a text with {prompt}, {first} and {second}."""
    judge_base_url: str | None = None
    """Address of the OpenAI-compatible endpoint of openai:MODEL. Unset: OpenAI's own, or $OPENAI_BASE_URL."""
    judge_api_key_env: str = "OPENAI_API_KEY"
    """Name of the environment variable with the endpoint's key. The key itself is never a setting."""
    judge_args: dict[str, Any] = field(default_factory=dict)
    """Further fields of a request to the endpoint (max_tokens, temperature, ...); null leaves one out."""
    judge_concurrency: int = 8
    """Requests at the same time."""
    judge_deadline: float = 120.0
    """Seconds within which a comparison has to be answered, retries included; one attempt may take half of it."""

    # -- the method ----------------------------------------------------------------------------------------
    eta: float | Literal["auto"] = "auto"
    """Step size in nats per unit of reward (large = long step), or auto: from the spread of the rewards."""
    kl_per_iteration: float | None = None
    """With eta auto: keep KL(new policy || old) at so many nats per completion and iteration (with beta: at most)."""
    beta: float = 0.0
    """Price of the KL to the initial policy, in reward per nat of a whole completion (TRL's is per token)."""
    kl: Literal["proximal", "shaped"] = "proximal"
    """proximal: step 1/(1/eta + beta), stable for every eta. shaped: eta, as in the authors' code (eta*beta < 2)."""
    pairing: Literal["all", "extremes", "random"] = "all"
    """Pairs to regress: all of them, best against worst, or random disjoint ones."""
    credit: Literal["auto", "trajectory", "step", "stretch"] = "auto"
    """What a reward is credited to. trajectory: all of a completion or image together, as in the paper. step: each step
    of an image, by a regression of its own. stretch: each stretch of a text, by what it changed in the reward of what
    is written so far. auto: stretch if every reward function says `judges_beginnings = True` (not offline, in rounds
    or with a judge), else trajectory."""
    credit_tokens: int = 8
    """With credit stretch: tokens of a stretch. The reward functions are called for the text after each of them."""
    credit_lambda: float = 0.3
    """With credit stretch: the share of what the next stretch changed that one is credited with too (GAE's lambda)."""
    num_generations: int = 8
    """Completions per prompt."""
    missing_eos_penalty: float | None = None
    """Subtracted from the reward of a completion that the length limit cut off."""
    drop_truncated: bool = False
    """Leave completions that the length limit cut off out of their group instead."""
    replace_flat_groups: float = 0.0
    """Draw up to this factor of extra prompts for groups whose rewards are all equal. Counted as samples."""

    # -- sampling ------------------------------------------------------------------------------------------
    temperature: float = 1.0
    """Sampling temperature; the log-probabilities of the regression are taken at the same temperature."""
    max_completion_length: int = 256
    """Longest completion in tokens."""
    top_p: float = 1.0
    """Refused unless 1: a truncated distribution is not the one whose log-probabilities are regressed."""
    top_k: int | None = None
    """Refused unless unset or 0, for the same reason."""
    min_p: float | None = None
    """Refused unless unset or 0, for the same reason."""
    repetition_penalty: float = 1.0
    """Refused unless 1, for the same reason."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Passed to the tokenizer's chat template."""
    sampling_batch: int = 64
    """Completions drawn at once by the sampler of this process; fixes the order of random numbers."""
    sampler: Literal["generate", "vllm"] = "generate"
    """Who draws: generate (the trainer's own model) or vllm, which gets the policy's weights before every use."""
    vllm_mode: Literal["colocate", "server"] = "colocate"
    """vLLM in this process, on its device, or as a server on another device or machine."""
    vllm_server_base_url: str | None = None
    """Address of the server, such as http://127.0.0.1:8000."""
    vllm_weights_dir: str | None = None
    """Folder through which a server gets the weights; it must see it under the same name. Unset: in output_dir."""
    vllm_deadline: float = 240.0
    """Seconds for any one answer of a server: that it is there, that it has the weights, a batch of completions."""
    vllm_gpu_memory_utilization: float = 0.3
    """Share of the device's memory for vLLM in this process: its weights, and keys and values."""
    vllm_enable_sleep_mode: bool = True
    """On a GPU, give the memory of vLLM in this process back while it does not draw."""
    vllm_max_mismatch: float | None = None
    """Stop when a token's log-probability by vLLM and by the trainer differ by more nats, measured on a probe whenever
    weights were sent. Unset: 0.01, and 0.25 in 16 bits."""
    one_step_ahead: bool = False
    """Let a vLLM server draw for the next iteration while this one is trained: completions come from the policy of one
    iteration before pi_t, which the regression allows."""

    # -- large batch ---------------------------------------------------------------------------------------
    rounds: int | None = None
    """Draw the whole prompt set so many times: each round goes to disk, is scored, and then regressed in iterations."""
    round_prompts: int | None = None
    """Prompts of a round. Unset: all."""
    round_epochs: int = 1
    """Passes over the rollouts of a round, prompts_per_iteration at a time; num_iterations repeats each iteration."""
    from_rollouts: str | None = None
    """Regress the rollouts of this folder, which `rebel rollout` draws and `rebel score` scores, in one round."""
    shard_prompts: int = 64
    """Prompts of one file of rollouts, which is also what an interruption may cost; fixes the random numbers."""

    # -- images --------------------------------------------------------------------------------------------
    denoising_steps: int = 10
    """Denoising steps of an image, in training and in evaluation."""
    guidance_scale: float | None = None
    """Guidance by the prompt. Unset: the pipeline's own default."""
    noise_level: float | None = None
    """Noise of the steps: eta of DDIM (unset: 1), a of the stochastic flow of SD3 and FLUX (unset: 0.7)."""
    noise_floor: float = 0.0
    """Least noise of a step, in units of the latents. At 0 a step without noise, mostly the last, is not scored."""
    image_size: int | None = None
    """Height and width in pixels. Unset: the pipeline's own."""
    same_noise: bool = False
    """Begin all images of a prompt at the same noise; those of the next prompt at another."""
    algorithm: Literal["rebel", "ppo_clip"] = "rebel"
    """rebel, or to compare with it PPO's clipped objective on the denoising steps (DDPO), which has no eta."""
    clip_range: float = 0.2
    """With ppo_clip: how far the probability ratio of a step may go from 1."""
    images_per_micro_batch: int = 4
    """Images that go through the pipeline at once, to draw and to train; sets the memory, never the result."""
    judge_funcs: list[str] = field(default_factory=list)
    """Judges of images that are never the reward: functions as for reward_funcs, evaluated beside it."""

    # -- batch and optimisation ----------------------------------------------------------------------------
    prompts_per_iteration: int = 32
    """Prompts drawn for each iteration, all processes together."""
    steps_per_iteration: int = 8
    """Optimiser steps per pass over the iteration's completions: as many minibatches of whole groups."""
    num_iterations: int | None = None
    """Passes over the completions of one iteration. Unset: 4, and 1 offline or in rounds. (TRL's default is 1.)"""
    tokens_per_micro_batch: int = 8192
    """Tokens in one forward pass, and what takes as much memory; sets the memory of training, never its result."""
    shared_prefix: bool = True
    """Compute a prompt once for all its completions in a micro-batch, where model and settings allow it."""
    learning_rate: float = 1e-5
    """Peak learning rate."""
    lr_scheduler_type: str = "constant"
    """Any schedule of transformers: constant, linear, cosine, ..."""
    lr_scheduler_kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the schedule."""
    warmup_steps: float = 0.0
    """Optimiser steps of warm-up; below 1, their share of all."""
    optim: str = "adamw_torch"
    """Any optimiser name of transformers."""
    weight_decay: float = 0.0
    """Weight decay of the optimiser."""
    adam_beta1: float = 0.9
    """First moment's decay."""
    adam_beta2: float = 0.999
    """Second moment's decay."""
    adam_epsilon: float = 1e-8
    """Adam's epsilon."""
    max_grad_norm: float = 0.0
    """Longest gradient; 0 for no clipping. Norms here are of sums over completions: hundreds are no cause for alarm."""
    average: float | None = None
    """Memory of the averaged iterate that is evaluated and saved, as a share of all steps so far; 0: the last iterate.
    Unset: 0.3 with beta > 0, where the iterates come to rest around a point, and 0 where they keep moving."""
    mixture: int = 0
    """Keep so many iterates, evenly over the run, and evaluate their mixture: one of them draws each completion. For
    preferences that go round in circles, as the iterates then do."""
    bf16: bool = False
    """Mixed precision on bfloat16."""
    fp16: bool = False
    """Mixed precision on float16 (CUDA only)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    activation_offloading: bool = False
    """Keep activations in the memory of the host until the backward pass. Needs a GPU."""
    early_stop: bool = False
    """Keep a share of each iteration's groups out of training; end its steps when the R^2 on them no longer rises."""
    held_out: float = 0.125
    """That share, with early_stop."""

    # -- the run -------------------------------------------------------------------------------------------
    output_dir: str = "rebel-run"
    """Folder of the run: settings, metrics, checkpoints, the tuned model, report.html."""
    overwrite_output_dir: bool = False
    """Delete what a former run left in output_dir."""
    iterations: int | None = None
    """Iterations of sampling and regressing; this, max_steps or num_train_epochs is given."""
    max_steps: int = -1
    """Optimiser steps, instead of iterations; rounded up to whole iterations."""
    num_train_epochs: float | None = None
    """Laps over the data, instead of iterations; rounded up to whole iterations."""
    seed: int = 42
    """Seed of prompts, sampling and shuffling."""
    use_cpu: bool = False
    """Stay on the CPU."""
    logging_steps: int = 1
    """Optimiser steps between reports; an iteration is reported once, at its end."""
    eval_strategy: Literal["no", "steps"] = "steps"
    """Whether to evaluate during the run, at ends of iterations. The first and last evaluation are made in any case."""
    eval_steps: int = 80
    """Optimiser steps between evaluations, rounded up to whole iterations."""
    eval_generations: int = 1
    """Completions per prompt of an evaluation."""
    eval_temperature: float | None = None
    """Temperature of evaluation; 0 is greedy. Unset: the temperature of training."""
    eval_against: str | None = None
    """Evaluate by win rate too, against: initial (the policy before training), references (written completions in the
    data), a run, or a model's name or folder."""
    eval_judge: str | None = None
    """Who compares for eval_against: as for judge, or reward:NAME for a reward, of which the higher wins."""
    reference_column: str = "reference"
    """Column of the evaluation data with the references."""
    save_strategy: Literal["no", "steps"] = "steps"
    """Whether to write checkpoints during the run."""
    save_steps: int = 80
    """Optimiser steps between checkpoints, rounded up to whole iterations."""
    save_total_limit: int | None = 2
    """How many checkpoints to keep."""
    load_best_model_at_end: bool = False
    """Save the policy of the best evaluation as the result."""
    metric_for_best_model: str | None = None
    """The metric of the best evaluation, with or without eval_ before it. Unset: reward, and accuracy offline."""
    greater_is_better: bool | None = None
    """Whether a larger value is better. Unset: unless the name of the metric ends with loss."""
    resume_from_checkpoint: str | bool | None = None
    """A checkpoint folder, or true for the latest one in output_dir (--resume)."""
    report_to: list[str] = field(default_factory=lambda: ["none"])
    """Trackers of transformers: tensorboard, wandb, trackio, mlflow, ..., all or none."""
    run_name: str | None = None
    """Name of the run in the trackers."""
    disable_tqdm: bool = False
    """No progress bars."""
    push_to_hub: bool = False
    """Upload the result."""
    hub_model_id: str | None = None
    """Repository to upload to."""

    # -- TRL's batch arguments, translated ---------------------------------------------------------------------
    per_device_train_batch_size: int | None = None
    """TRL: completions per device and micro-batch. Translated into prompts_per_iteration and steps_per_iteration."""
    gradient_accumulation_steps: int | None = None
    """TRL: translated likewise."""
    generation_batch_size: int | None = None
    """TRL: completions per generation, translated likewise."""
    steps_per_generation: int | None = None
    """TRL: translated likewise."""

    @property
    def passes(self) -> int:
        """num_iterations, or what it is unset."""
        once = self.offline or self.rounds is not None or self.from_rollouts is not None
        return (1 if once else 4) if self.num_iterations is None else self.num_iterations

    @property
    def adapter(self) -> bool:
        """Whether an adapter is trained, and not all weights."""
        asked = bool(self.pipeline_name_or_path) if self.use_peft is None else self.use_peft
        return asked or bool(self.adapter_path)

    @property
    def best_metric(self) -> str:
        """metric_for_best_model as the metrics of a run have it, or what it is unset."""
        asked = self.metric_for_best_model or ("accuracy" if self.offline else "reward")
        return "eval/" + asked.removeprefix("eval/").removeprefix("eval_")

    @property
    def larger_is_better(self) -> bool:
        """greater_is_better, or what it is unset."""
        return not self.best_metric.endswith("loss") if self.greater_is_better is None else self.greater_is_better
