"""Displaced steps: what they cost in exactness, what they send, and what of it is waited for.

    python -m benchmarks.displaced.train_denoiser                                        # once, under two minutes
    torchrun --nproc_per_node=2 -m benchmarks.displaced quality               # PSNR against one device
    torchrun --nproc_per_node=2 -m benchmarks.displaced hidden --delay-ms 5   # time of 20 steps, and bytes

All three take ``--model transformer``. Both print Markdown on rank 0. ``quality`` samples with the denoiser of
``train_denoiser.py`` and decodes with the demo VAE, on all ranks; the transformer has learned 128 pixels (``--side``).
``hidden`` runs a U-Net of Stable Diffusion's kind, or a transformer of PixArt's, with random weights; what is received
is released ``--delay-ms`` after it was posted.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from diffusers import PixArtTransformer2DModel, UNet2DConditionModel
from torch import Tensor, nn

import distpatch
from benchmarks.displaced.train_denoiser import Kind, load_denoiser, load_vae, noise_in, scheduler
from distpatch import launch
from tests.support.transports.delay import delayed

TEXT = 64

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def first_noise(side: int, pictures: int) -> Tensor:
    """The same on all ranks, (B, 16, side / 8, side / 8)."""
    return torch.randn(pictures, 16, side // 8, side // 8, generator=torch.Generator().manual_seed(5))


def sample(net: nn.Module, x: Tensor, steps: int) -> Tensor:
    """Latents after so many steps of DDIM, from noise that is sharded where they shall be."""
    noise = scheduler()
    noise.set_timesteps(steps)
    for t in noise.timesteps:
        x = noise.step(noise_in(net, x, t), t, x).prev_sample
    return x


def psnr(a: Tensor, b: Tensor) -> float:
    """In dB, of pictures (B, 3, h, w) in [0, 1]: the mean of theirs."""
    errors = (a - b).double().square().mean((1, 2, 3)).clamp(min=1e-30)
    return float(-10 * errors.log10().mean())


def _print(console: Any, line: str) -> None:
    console.print(line, soft_wrap=True, highlight=False)


@app.command()
def quality(
    side: Annotated[int, typer.Option(min=64, help="Pixels.")] = 256,
    steps: Annotated[list[int] | None, typer.Option(help="Numbers of steps.")] = None,
    warmup: Annotated[list[int] | None, typer.Option(help="Lengths of the warm-up, for 20 steps.")] = None,
    model: Annotated[Kind, typer.Option(help="Which denoiser.")] = Kind.UNET,
    pictures: Annotated[int, typer.Option(min=1, help="So many, and the mean of their PSNR.")] = 1,
) -> None:
    """PSNR, against one device, of the decoded picture: by policy and steps, and by warm-up."""
    with launch.process_group() as (group, _), torch.no_grad():
        console = launch.console(group)
        net = load_denoiser(model)
        vae = load_vae()
        distpatch.convert_model(vae, group)

        def picture(latents: Tensor) -> Tensor:
            decoded: Tensor = vae.decode(latents / vae.config.scaling_factor).sample
            return (decoded / 2 + 0.5).clamp(0, 1)

        counts = steps or [10, 20, 50]
        noise = first_noise(side, pictures)
        exact = {count: picture(sample(net, noise, count)) for count in {*counts, 20}}
        distpatch.convert_model(net, group, output="shard")
        rows = distpatch.shard(noise, group)

        def measured(policy: str, count: int, warmup_steps: int) -> float:
            with distpatch.displaced(net, policy=policy, warmup_steps=warmup_steps):
                latents = sample(net, rows, count)
            return psnr(picture(latents), exact[count])

        _print(console, f"{side} x {side} pixels, {group.size()} ranks, warm-up of 1 + 1 steps: PSNR in dB\n")
        _print(console, "| policy | " + " | ".join(f"{count} steps" for count in counts) + " |")
        _print(console, "|---" * (len(counts) + 1) + "|")
        for policy in distpatch.DISPLACED_POLICIES:
            row = [f"{measured(policy, count, 1):.1f}" for count in counts]
            _print(console, f"| {policy} | " + " | ".join(row) + " |")
        row = [f"{measured('corrected_async_gn', count, max(count // 5 - 1, 0)):.1f}" for count in counts]
        _print(console, "| corrected_async_gn, of which a fifth of the steps wait | " + " | ".join(row) + " |")
        _print_waited(console, counts[0], lambda policy: _sent(net, rows[:1], policy, counts[0]))
        lengths = warmup or [0, 1, 4, 9]
        _print(console, "\n| 20 steps, warm-up of 1 + | " + " | ".join(map(str, lengths)) + " |")
        _print(console, "|---" * (len(lengths) + 1) + "|")
        for policy in ("corrected_async_gn", "stale_gn", "no_sync"):
            row = [f"{measured(policy, 20, length):.1f}" for length in lengths]
            _print(console, f"| {policy} | " + " | ".join(row) + " |")


def _sent(net: nn.Module, rows: Tensor, policy: str, steps: int) -> tuple[float, float]:
    """KiB of a picture, after a warm-up of 1 + 1 steps, that the other ranks wait for, and that they do not."""
    with distpatch.displaced(net, policy=policy, warmup_steps=1), distpatch.trace() as t:
        sample(net, rows, steps)
    behind = sum(record.sent_bytes for record in t.records if record.kind == "displaced")
    return (sum(record.sent_bytes for record in t.records) - behind) / 1024, behind / 1024


def _print_waited(console: Any, steps: int, sent: Callable[[str], tuple[float, float]]) -> None:
    _print(console, f"\n| sent by rank 0 in {steps} steps | KiB waited for | KiB behind the computation |")
    _print(console, "|---|---|---|")
    for policy in distpatch.DISPLACED_POLICIES:
        waited, behind = sent(policy)
        _print(console, f"| {policy} | {waited:,.0f} | {behind:,.0f} |")


def build_net(kind: Kind) -> nn.Module:
    """For latents of 4 channels, with random weights."""
    torch.manual_seed(0)
    if kind == Kind.TRANSFORMER:
        return PixArtTransformer2DModel(
            num_attention_heads=8,
            attention_head_dim=32,
            num_layers=6,
            out_channels=4,
            cross_attention_dim=256,
            caption_channels=TEXT,
            sample_size=32,
            use_additional_conditions=False,
        ).eval()
    return UNet2DConditionModel(
        block_out_channels=(64, 128),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=TEXT,
        attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()


def noise_with_text(net: nn.Module, x: Tensor, time: int, text: Tensor) -> Tensor:
    if isinstance(net, UNet2DConditionModel):
        return net(x, time, text).sample
    nothing = {"resolution": None, "aspect_ratio": None}
    times = torch.full((len(x),), time)
    return net(x, encoder_hidden_states=text, timestep=times, added_cond_kwargs=nothing).sample


@app.command()
def hidden(
    delay_ms: Annotated[float, typer.Option(min=0, help="What is received comes so much later.")] = 5,
    rows: Annotated[int, typer.Option(min=8, help="Rows and columns of the latents.")] = 32,
    steps: Annotated[int, typer.Option(min=2, help="Displaced steps that are timed.")] = 20,
    rounds: Annotated[int, typer.Option(min=1, help="Of each; the median step counts.")] = 2,
    model: Annotated[Kind, typer.Option(help="Of which kind the net is.")] = Kind.UNET,
) -> None:
    """Time of displaced and of synchronous steps, with and without delay; what a rank sends a step."""
    with launch.process_group(threads=1) as (group, _), torch.no_grad():
        console = launch.console(group)
        net = distpatch.convert_model(build_net(model), group, output="shard")
        draw = torch.Generator().manual_seed(1)
        x = distpatch.shard(torch.randn(2, 4, rows, rows, generator=draw), group)
        text = torch.randn(2, 77, TEXT, generator=draw)

        def run(policy: str, late_ms: float) -> tuple[list[float], distpatch.Trace]:
            """Seconds of each step after the warm-up."""
            times = [0.0]
            late: Any = delayed(late_ms / 1e3) if late_ms else contextlib.nullcontext()
            image: Tensor = x
            with distpatch.displaced(net, policy=policy, warmup_steps=1), late, distpatch.trace() as t:
                for step in range(steps + 2):
                    if step == 2:
                        dist.barrier(group)
                        t.records.clear()
                    started = time.perf_counter()
                    image = image - 0.02 * noise_with_text(net, image, 900 - 10 * step, text)
                    times.append(time.perf_counter() - started)
            return times[-steps:], t

        cases = [(policy, late) for policy in ("corrected_async_gn", "full_sync") for late in (0.0, delay_ms)]
        found: dict[Any, list[tuple[list[float], distpatch.Trace]]] = {case: [] for case in cases}
        for _ in range(rounds):
            for case in cases:
                found[case].append(run(*case))
        _print(console, f"{steps} steps, latents {rows} x {rows}, batch 2, {group.size()} ranks of one thread\n")
        _print(console, "| policy | delay | seconds | of the same without | waited for, of under way, ms a step |")
        _print(console, "|---|---|---|---|---|")
        for policy, late in cases:
            seconds, plain = (
                steps * statistics.median(s for times, _ in found[policy, ms] for s in times) for ms in (late, 0.0)
            )
            ratio = seconds / plain
            waits = found[policy, late][-1][1].waits
            behind, blocked = (1e3 * sum(getattr(w, n) for w in waits) / steps for n in ("behind_s", "blocked_s"))
            waited = f"{blocked:.1f} of {behind + blocked:.0f}" if waits else "-"
            _print(console, f"| {policy} | {late:g} ms | {seconds:.2f} | {ratio:.2f}x | {waited} |")
        trace = found["corrected_async_gn", 0.0][-1][1]
        _print_bytes(console, trace, steps, group.size(), _halos(net, x, text))


def _halos(net: nn.Module, x: Tensor, text: Tensor) -> list[int]:
    """Bytes of the rows at both edges of a shard that DistriFusion gives away, of each convolution but the first."""
    sizes: list[int] = []

    def see(conv: Any, args: Any) -> None:
        batch, channels, _, width = args[0].shape
        sizes.append(2 * batch * channels * conv.padding[0] * width * args[0].element_size())

    convs = [m for name, m in net.named_modules() if isinstance(m, nn.Conv2d) and name != "conv_in"]
    hooks = [conv.register_forward_pre_hook(see) for conv in convs if conv.kernel_size[0] > conv.stride[0]]
    noise_with_text(net, x, 900, text)
    for hook in hooks:
        hook.remove()
    return sizes


def _print_bytes(console: Any, trace: distpatch.Trace, steps: int, ranks: int, halos: list[int]) -> None:
    _print(console, "\n| sent a step by rank 0, behind the computation | KiB |\n|---|---|")
    for op in sorted({record.op for record in trace.records if record.kind == "displaced"} - {"messages"}):
        sent = sum(r.sent_bytes for r in trace.records if (r.kind, r.op) == ("displaced", op)) / steps
        _print(console, f"| {op} | {sent / 1024:.1f} |")
    messages = sum(r.messages for r in trace.records if r.kind == "displaced") / steps
    _print(console, f"| messages | {messages:.0f} of them |")
    if gathered := (ranks - 1) * sum(halos) / 1024:
        _print(console, f"| halos by all-gather, as DistriFusion, (N - 1) x 2 edges | {gathered:.1f} |")


if __name__ == "__main__":
    app()
