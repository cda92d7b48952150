"""Pipelines as policies: what was drawn is what is scored, for five families, and gradients one step at a time."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import tiny_images
import torch
from accelerate import Accelerator
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
)
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from rebel import credit
from rebel.algorithm import regression_batch, trace_weights
from rebel.build.pipeline import trainable
from rebel.config import RebelConfig
from rebel.credit import Known
from rebel.errors import RebelError
from rebel.learner import Learner, learner
from rebel.pairing import all_pairs
from rebel.policies.diffusion import Diffusion, diffusion, frozen_copy, put, without_adapter
from rebel.policies.kernels import Gaussian, flow_mean, flow_std, noise_of, with_noise
from rebel.samplers.denoise import Denoise
from rebel.samplers.replay import check_replay
from rebel.types import LatentTrace, Prompt, Rollout, Scored

FAMILIES = list(tiny_images.FAMILIES)
PROMPTS = [Prompt("a cat"), Prompt("the red house")]

NO_INFLUENCE = {"sd3": {"transformer_blocks.1.attn.add_q_proj.weight", "transformer_blocks.1.attn.add_q_proj.bias"}}
"""Parameters that the output does not depend on: what SD3's last block asks of the image on behalf of the prompt."""


def policy(family: str, lora: bool = False, double: bool = False, **settings: Any) -> Diffusion:
    """A random pipeline, trained whole or by an adapter that has moved a little from where it began."""
    config = RebelConfig(pipeline_name_or_path=family, use_peft=lora, lora_r=2)
    pipeline = tiny_images.pipeline(family).to(torch.float64 if double else torch.float32)
    made = diffusion(trainable(pipeline, config), tiny_images.STEPS[family], **settings)
    if lora:
        with torch.no_grad():
            for weight in made.trained:
                weight += 0.05 * torch.randn_like(weight)
    return made


def drawn(made: Diffusion, group: int = 3, batch: int = 4, seed: int = 5) -> list[LatentTrace]:
    return [trace for rollout in Denoise(made, batch)(PROMPTS, group, seed) for trace in rollout.traces]


def recorded(traces: Sequence[LatentTrace]) -> Tensor:
    return torch.stack([trace.drawn_logp for trace in traces if trace.drawn_logp is not None])


def gradient(made: Diffusion) -> Tensor:
    """The gradient that has piled up, which is then taken away."""
    found = torch.cat([torch.zeros_like(w).flatten() if w.grad is None else w.grad.flatten() for w in made.trained])
    for weight in made.trained:
        weight.grad = None
    return found


def backward(loss: Tensor) -> None:
    loss.backward()


def relative(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


# -- five families --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_pipeline_scores_what_it_drew_and_learns_from_it(family: str, lora: bool) -> None:
    """Replay is sampling, every parameter has a gradient, and step by step it is that of the whole graph."""
    made = policy(family, lora)
    traces = drawn(made)
    logp = made.log_prob(traces)
    columns = {"sd15": 5, "sdxl": 4, "lcm": 3, "sd3": 4, "flux": 3}[family]  # without the last step, but for sd15
    assert logp.shape == (6, columns)
    assert float((logp - recorded(traces)).detach().abs().max()) < 1e-4
    weights = torch.randn(6, columns, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (weights * logp).sum().backward()
    named = {name: w for name, w in made.denoiser.named_parameters() if w.requires_grad}
    still = {name for name, weight in named.items() if weight.grad is None or not weight.grad.any()}
    assert {name.replace(".base_layer", "") for name in still if "lora" not in name} == (
        set() if lora else NO_INFLUENCE.get(family, set())
    )
    assert {name.split(".lora_")[0] for name in still if "lora" in name} == (
        {"transformer_blocks.1.attn.add_q_proj"} if lora and family == "sd3" else set()
    )
    whole = gradient(made)
    for weigh in (lambda own: weights, Known(weights)):
        again = made.backward(traces, weigh, backward)
        torch.testing.assert_close(again, logp.detach())
        assert relative(gradient(made), whole) < 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_a_path_has_the_same_log_probability_and_gradient_in_every_batch(family: str) -> None:
    """One and sixteen: an identity, and so in double precision."""
    made = policy(family, double=True)
    traces = drawn(made, group=8, batch=16)
    together = made.log_prob(traces)
    apart = torch.cat([made.log_prob([trace]) for trace in traces])
    assert float((together - apart).detach().abs().max()) < 1e-9
    together.sum().backward()
    expected = gradient(made)
    apart.sum().backward()
    assert relative(gradient(made), expected) < 1e-10
    for one, other in zip(traces, drawn(made, group=8, batch=3), strict=True):  # an image's random numbers are its own
        torch.testing.assert_close(one.latents, other.latents, rtol=1e-9, atol=1e-9)


def test_prompts_and_guidance_have_their_say() -> None:
    """The text encoders run once a prompt, and what they make of it is what conditions the replay."""
    made = policy("sdxl")
    traces = drawn(made)
    swapped = [LatentTrace("a dog", trace.latents) for trace in traces]
    assert float((made.log_prob(swapped) - made.log_prob(traces)).abs().max()) > 1e-3
    assert list(made.bare.conditions.known) == ["a cat", "the red house", "a dog"]
    other = diffusion(made.pipeline, 5, guidance_scale=1.0)
    assert float((other.log_prob(traces) - made.log_prob(traces)).abs().max()) > 1e-3


def test_the_pipeline_is_left_as_it_was() -> None:
    made = policy("sd15")
    scheduler, config = made.pipeline.scheduler, dict(made.pipeline.config)
    traces = drawn(made)
    made.backward(traces, Known(torch.ones(6)), backward)
    assert made.pipeline.scheduler is scheduler
    assert dict(made.pipeline.config) == config


def test_where_encode_prompt_is_not_understood_the_text_itself_is_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    made = policy("sd15", double=True)
    expected = made.log_prob(drawn(made))
    kind = type(made.pipeline)
    plain = kind.encode_prompt

    def swapped(self: Any, prompt: Any, *args: Any, **more: Any) -> Any:
        found = plain(self, prompt, *args, **more)
        return found if prompt is None or len(prompt) > 1 else found[::-1]  # not in the order of its arguments

    monkeypatch.setattr(kind, "encode_prompt", swapped)
    other = policy("sd15", double=True)
    assert other.bare.conditions.names == []
    monkeypatch.setattr(kind, "encode_prompt", plain)
    torch.testing.assert_close(other.log_prob(drawn(made)), expected)


@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_gradient_checkpointing_changes_no_gradient(family: str) -> None:
    plain, made = policy(family, double=True), policy(family, double=True)
    made.denoiser.enable_gradient_checkpointing()
    traces = drawn(plain, group=1)
    for one in (plain, made):
        one.backward(traces, Known(torch.ones(2)), backward)
    assert relative(gradient(made), gradient(plain)) < 1e-10


# -- memory ---------------------------------------------------------------------------------------------------------


class Saved:
    """Bytes that graphs hold for their backward pass, now and at most."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def pack(self, tensor: Tensor) -> Any:
        size = tensor.nbytes if not isinstance(tensor, torch.nn.Parameter) else 0
        self.now += size
        self.most = max(self.most, self.now)
        held = _Held(tensor)
        weakref.finalize(held, self.let_go, size)
        return held

    def let_go(self, size: int) -> None:
        self.now -= size


class _Held:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def held_bytes(steps: int, work: Callable[[Diffusion, list[LatentTrace]], Any]) -> int:
    made = diffusion(tiny_images.pipeline("sd15"), steps)
    traces = [LatentTrace("a cat", torch.randn(steps + 1, 4, 8, 8)) for _ in range(2)]
    saved = Saved()
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda held: held.tensor):
        work(made, traces)
    return saved.most


def test_memory_does_not_grow_with_the_number_of_steps() -> None:
    """By the bytes that autograd holds; benchmarks/image_memory.py has the memory of the whole process."""

    def stepwise(made: Diffusion, traces: list[LatentTrace]) -> None:
        made.backward(traces, Known(torch.ones(2)), backward)

    def whole(made: Diffusion, traces: list[LatentTrace]) -> None:
        made.log_prob(traces).sum().backward()

    few, many = held_bytes(5, stepwise), held_bytes(40, stepwise)
    assert many / few < 1.02
    assert held_bytes(5, whole) / few > 4, "else the test could not see it"


# -- kernels --------------------------------------------------------------------------------------------------------

BETAS = tiny_images.DIFFUSION


def walk(scheduler: Any, steps: int) -> Iterator[tuple[int, Any, Tensor, Tensor]]:
    """Steps of a scheduler, each with an output and a sample."""
    source = torch.Generator().manual_seed(2)
    scheduler.set_timesteps(steps)
    for step, t in enumerate(scheduler.timesteps):
        yield step, t, *torch.randn(2, 3, 4, 8, 8, generator=source)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize("clip", [False, True])
def test_ddim_has_the_mean_and_the_noise_of_the_library(
    prediction: str, spacing: str, to_one: bool, clip: bool
) -> None:
    scheduler = DDIMScheduler(
        **BETAS, clip_sample=clip, set_alpha_to_one=to_one, prediction_type=prediction, timestep_spacing=spacing
    )
    noise = noise_of(scheduler, 0.8)
    for step, t, output, x in walk(scheduler, 10):
        given = noise(scheduler, step, output, x)
        zero = torch.zeros_like(x)
        mean = scheduler.step(output, t, x, eta=0.8, variance_noise=zero).prev_sample
        above = scheduler.step(output, t, x, eta=0.8, variance_noise=zero + 1).prev_sample
        torch.testing.assert_close(given.mean, mean, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(torch.full_like(x, given.std), above - mean, rtol=1e-3, atol=1e-4)
    ends_clean = to_one or spacing == "leading"  # whose last step is at the first alpha already
    assert noise.noisy(scheduler) == list(range(9 if ends_clean else 10))


def test_the_step_that_follows_is_the_next_one_under_every_spacing() -> None:
    """The library's DDIM takes t - 1000 // steps, which is not where it evaluates the model next."""
    scheduler = DDIMScheduler(**BETAS, clip_sample=False, timestep_spacing="linspace")
    scheduler.set_timesteps(7)
    noise = noise_of(scheduler, 1.0)
    clean = torch.zeros(1, 1, 1, 1)
    now, following = (scheduler.alphas_cumprod[scheduler.timesteps[k]] for k in (0, 1))
    x = now.sqrt() * clean + (1 - now).sqrt() * torch.ones(1, 1, 1, 1)
    given = noise(scheduler, 0, torch.ones(1, 1, 1, 1), x)
    assert float(given.mean**2 + given.std**2) == pytest.approx(float(1 - following), rel=1e-5)


def test_lcm_has_the_mean_and_the_noise_of_the_library() -> None:
    scheduler = LCMScheduler(**BETAS)
    noise = noise_of(scheduler)
    for step, t, output, x in walk(scheduler, 4):
        given = noise(scheduler, step, output, x)
        found = scheduler.step(output, t, x, generator=torch.Generator().manual_seed(step))
        z = torch.randn(x.shape, generator=torch.Generator().manual_seed(step))
        torch.testing.assert_close(given.mean + given.std * z, found.prev_sample, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(given.clean, found.denoised, rtol=1e-4, atol=1e-4)
    assert noise.noisy(scheduler) == [0, 1, 2]


def test_flow_matching_without_noise_is_the_ode_of_the_library() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    for step, t, output, x in walk(scheduler, 6):
        mean, clean = flow_mean(scheduler, step, 0.0, output, x)
        torch.testing.assert_close(mean, scheduler.step(output, t, x).prev_sample)
        torch.testing.assert_close(clean, x - scheduler.sigmas[step] * output)
        assert flow_std(scheduler, step, 0.0) == 0


@pytest.mark.parametrize("level", [0.3, 0.7, 1.0])
def test_flow_matching_with_noise_has_the_marginals_of_the_ode(level: float) -> None:
    """In closed form: data N(1, 0.5^2) and the exact velocity, so that x_t is Gaussian for every t."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(4000)
    mean, variance = 0.0, 1.0

    def marginal(t: float) -> tuple[float, float]:
        return 1 - t, (1 - t) ** 2 * 0.25 + t**2

    def velocity(x: Tensor, t: float) -> Tensor:
        centre, spread = marginal(t)
        return -1 + (t - (1 - t) * 0.25) / spread * (x - centre)

    for step in range(3990):
        t = float(scheduler.sigmas[step])
        x = torch.tensor([mean, mean + 1.0], dtype=torch.float64)
        after, _ = flow_mean(scheduler, step, level, velocity(x, t), x)
        slope = float(after[1] - after[0])
        mean, variance = float(after[0]), slope**2 * variance + flow_std(scheduler, step, level) ** 2
    expected = marginal(float(scheduler.sigmas[3990]))
    assert mean == pytest.approx(expected[0], rel=2e-3)
    assert variance == pytest.approx(expected[1], rel=1e-2)


def test_a_gaussian_has_the_density_and_the_divergence_of_torch() -> None:
    mean, other, x = torch.randn(3, 2, 3, 4, dtype=torch.float64)
    given = Gaussian(mean, 0.3, mean)
    torch.testing.assert_close(given.log_prob(x), Normal(mean, 0.3).log_prob(x).sum(dim=(1, 2)))
    kl = kl_divergence(Normal(mean, 0.3), Normal(other, 0.3)).sum(dim=(1, 2))
    torch.testing.assert_close(given.divergence(Gaussian(other, 0.3, other)), kl)


def test_a_floor_gives_noise_to_the_last_step_too() -> None:
    made = policy("sdxl", noise_floor=0.05)
    traces = drawn(made)
    assert made.log_prob(traces).shape == (6, 5)
    assert float((made.log_prob(traces) - recorded(traces)).abs().max()) < 1e-4
    stds = [given.std for given in made.gaussians(traces)]
    assert min(stds) == stds[-1] == 0.05


# -- sampling -------------------------------------------------------------------------------------------------------


def test_images_of_a_prompt_may_begin_at_the_same_noise() -> None:
    made = policy("sd15")
    apart = drawn(made)
    joint = [t for rollout in Denoise(made, 4, same_noise=True)(PROMPTS, 3, 5) for t in rollout.traces]
    first = torch.stack([trace.latents[0] for trace in joint])
    assert torch.equal(first[0], first[1]) and torch.equal(first[3], first[5])
    assert not torch.equal(first[0], first[3])
    assert not torch.equal(joint[0].latents[1], joint[1].latents[1])
    assert len({float(trace.latents[0].sum()) for trace in apart}) == 6


@pytest.mark.parametrize("batch", [1, 2, 3, 7])
def test_groups_come_in_the_order_of_their_prompts(batch: int) -> None:
    made = policy("sd15")
    rollouts = list(Denoise(made, batch)([*PROMPTS, Prompt("a dog")], 2, 5))
    assert [r.prompt.content for r in rollouts] == ["a cat", "the red house", "a dog"]
    assert all(trace.prompt == r.prompt.content for r in rollouts for trace in r.traces)
    assert all(c.content.size == (16, 16) and c.finished for r in rollouts for c in r.completions)


def test_batches_of_one_size_are_filled_up_and_change_nothing() -> None:
    plain, fixed = policy("sd15", double=True), policy("sd15", double=True, batch=4)
    traces = drawn(plain)
    torch.testing.assert_close(fixed.log_prob(traces[:3]), plain.log_prob(traces[:3]))
    calls: list[int] = []
    fixed.denoiser.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    fixed.log_prob(traces[:1])
    drawn(fixed, group=1)
    assert set(calls) == {8}, "four images, each with and without its prompt"
    fixed.log_prob(traces[:1]).sum().backward()
    plain.log_prob(traces[:1]).sum().backward()
    assert relative(gradient(fixed), gradient(plain)) < 1e-10


# -- references and movement ----------------------------------------------------------------------------------------


def test_the_reference_is_the_model_without_its_adapter_or_a_copy_of_what_is_trained() -> None:
    bare = policy("sd3")
    traces = drawn(bare)
    made = policy("sd3", lora=True)
    base, copied = without_adapter(made), frozen_copy(made)
    with torch.no_grad():
        torch.testing.assert_close(base(traces), bare.log_prob(traces), rtol=1e-6, atol=1e-4)
        before = made.log_prob(traces)
        assert float((before - base(traces)).abs().max()) > 0.1
        trained = [weight.detach().clone() for weight in made.trained]
        put(made.trained, [weight + 0.1 for weight in trained])
        after = made.log_prob(traces)
        torch.testing.assert_close(copied(traces), before)
        torch.testing.assert_close(base(traces), bare.log_prob(traces), rtol=1e-6, atol=1e-4)
        torch.testing.assert_close(made.log_prob(traces), after)
    assert len(made.trained) == len(trained), "the adapter is trained again after the reference"


def test_the_divergence_is_that_of_the_gaussians_of_every_step() -> None:
    made = policy("lcm", lora=True)
    traces = drawn(made)
    before = [weight.detach().clone() for weight in made.trained]
    then = made.gaussians(traces)
    assert not made.divergence(traces, before).any()
    with torch.no_grad():
        put(made.trained, [weight + 0.05 for weight in before])
    now = made.gaussians(traces)
    by_hand = [
        kl_divergence(Normal(a.mean, a.std), Normal(b.mean, b.std)).flatten(1).sum(1).double()
        for a, b in zip(now, then, strict=True)
    ]
    found = made.divergence(traces, before)
    torch.testing.assert_close(found, torch.stack(by_hand, dim=1).detach(), rtol=1e-4, atol=1e-6)
    assert float(found.min()) > 0


# -- the learner ----------------------------------------------------------------------------------------------------


def a_learner(budget: int, own_credit: Any) -> Learner:
    return learner(
        Accelerator(cpu=True),
        policy("sd15", double=True),
        lambda weights: torch.optim.SGD(weights, lr=1.0),
        lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0),
        budget=budget,
        credit=own_credit,
    )


@pytest.mark.parametrize("own_credit", [credit.trajectory, credit.step])
def test_the_gradient_does_not_depend_on_the_micro_batches(own_credit: Any) -> None:
    """Groups of 3, one at a time, in parts, or together; the anchor is not the policy as it is."""
    source = torch.Generator().manual_seed(3)
    traces = drawn(policy("sd15", double=True))
    groups = [traces[:3], traces[3:]]
    rollouts = [Rollout(p, tuple()) for p in PROMPTS]
    rewards = torch.randn(2, 3, generator=source, dtype=torch.float64)
    scored = [Scored(r, rewards=own) for r, own in zip(rollouts, rewards, strict=True)]
    shape = (6,) if own_credit is credit.trajectory else (6, 5)
    shift = 0.3 * torch.randn(*shape, generator=source, dtype=torch.float64)
    found = {}
    for budget in (100, 3, 2, 1):
        one = a_learner(budget, own_credit)
        anchor = one.columns(one.policy.log_prob, traces) + shift

        def weigh(places: Sequence[int], logp: Tensor, anchor: Tensor = anchor) -> Tensor:
            parts = [regression_batch(scored[k], all_pairs, anchor[3 * k : 3 * k + 3], prompts=2) for k in places]
            own = logp.split(3)
            return torch.cat([trace_weights(x, batch, 2.0) for x, batch in zip(own, parts, strict=True)])

        before = [weight.detach().clone() for weight in one.weights]
        logp = one.update(groups, weigh)
        torch.testing.assert_close(logp, anchor - shift, rtol=0, atol=1e-9)
        found[budget] = torch.cat([(b - w).detach().flatten() for b, w in zip(before, one.weights, strict=True)])
    for other in found.values():
        assert relative(other, found[100]) < 1e-9


# -- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [PNDMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler])
def test_ddim_stands_in_for_a_scheduler_without_noise(kind: Any) -> None:
    pipeline = tiny_images.pipeline("sd15")
    pipeline.scheduler = kind(**BETAS, timestep_spacing="trailing")
    made = diffusion(pipeline, 4)
    used = made.pipeline.scheduler
    assert isinstance(used, DDIMScheduler)
    assert not used.config.clip_sample and used.config.timestep_spacing == "trailing"
    assert float((made.log_prob(drawn(made)) - recorded(drawn(made))).abs().max()) < 1e-4


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchHeunDiscreteScheduler(),
        DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
    ],
)
def test_an_ode_that_nothing_can_stand_in_for_is_refused(scheduler: Any) -> None:
    with pytest.raises(RebelError, match=f"{type(scheduler).__name__} is an ordinary differential equation"):
        with_noise(scheduler)


def test_a_scheduler_with_what_is_not_known_is_refused() -> None:
    with pytest.raises(RebelError, match="thresholding"):
        with_noise(DDIMScheduler(thresholding=True))
    with pytest.raises(RebelError, match="--noise_level"):
        noise_of(LCMScheduler(), 0.5)


@pytest.mark.parametrize("family", ["lcm", "sd3"])
def test_one_step_has_no_noise_and_is_refused(family: str) -> None:
    made = diffusion(tiny_images.pipeline(family), 1)
    with pytest.raises(RebelError, match="no denoising step has noise"):
        list(Denoise(made, 2)(PROMPTS, 2, 0))


def test_an_option_that_the_pipeline_does_not_take_is_refused() -> None:
    class Plain(type(tiny_images.pipeline("sd15"))):
        def __call__(self, prompt: Any, num_inference_steps: int = 5) -> None: ...

    pipeline = tiny_images.pipeline("sd15")
    pipeline.__class__ = Plain
    with pytest.raises(RebelError, match="--image_size: a Plain takes no height"):
        diffusion(pipeline, 5, image_size=16)


def test_messages_are_no_prompts_of_images() -> None:
    made = policy("sd15")
    with pytest.raises(RebelError, match="plain text"):
        list(Denoise(made, 2)([Prompt([{"role": "user", "content": "a cat"}])], 2, 0))


def test_paths_of_another_number_of_steps_are_refused() -> None:
    made = policy("sd15")
    with pytest.raises(RebelError, match="--denoising_steps 7: a path to re-score has 5"):
        diffusion(made.pipeline, 7).log_prob(drawn(made))


# -- the check before the first update ------------------------------------------------------------------------------


def test_replay_is_checked_and_found_to_be_sampling() -> None:
    assert check_replay(Denoise(policy("flux"), 3), PROMPTS) < 1e-4


def test_drawing_in_one_precision_and_scoring_in_another_is_found() -> None:
    contexts = [torch.autocast("cpu", torch.bfloat16)]
    sampler = Denoise(policy("sd15"), 2, precision=lambda: contexts.pop() if contexts else nullcontext())
    with pytest.raises(RebelError, match=r"step \d of 5 differs by .* nats"):
        check_replay(sampler, PROMPTS)


def test_dropout_is_found() -> None:
    made = policy("sd15")
    made.denoiser.train()
    for module in made.denoiser.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.2
    with pytest.raises(RebelError, match="training mode"):
        check_replay(Denoise(made, 2), PROMPTS)


def test_a_model_of_several_types_is_refused() -> None:
    pipeline = tiny_images.pipeline("sd15")
    pipeline.unet.to(torch.bfloat16)
    with pytest.raises(RebelError, match=r"unet .*bfloat16 .*text_encoder .*float32"):
        diffusion(pipeline, 5)


def test_bf16_replay_is_bf16_sampling() -> None:
    pipeline = tiny_images.pipeline("sd3").to(torch.bfloat16)
    made = diffusion(pipeline, 5, batch=4)
    traces = drawn(made, group=2)
    assert traces[0].latents.dtype == torch.bfloat16
    assert math.isclose(float((made.log_prob(traces) - recorded(traces)).abs().max()), 0.0, abs_tol=1e-3)
