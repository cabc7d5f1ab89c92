"""Differences, verdicts and table: `python -m benchmarks.parity.report results.json ...`."""

from __future__ import annotations

import json
import math
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FUSED, PLAIN = PATHS = ("fused", "plain")
CONTROL = "plain, fp32"
"""The plain path with products in fp32: the training without rounding to bf16."""

LOSS_TOLERANCE = 0.01
"""Largest relative difference of the losses at any step."""
MOVED = 0.05
"""Share of the first loss that training must remove; else equal losses prove nothing."""
GRADIENT_TOLERANCE = 0.01
"""Largest relative error of a gradient."""

SAME = (
    *("micro_batch_size", "gradient_accumulation_steps", "total_steps", "warmup_steps", "seed"),
    *("learning_rate", "lr_scheduler", "weight_decay", "max_grad_norm", "max_sequence_length"),
)
"""Settings that both plans must share; of the first two only the product."""

NONE = "–"
_KIND = re.compile(r"(\w+_proj)\.lora_([AB])\b")


def compare_training(runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Compare losses and gradient norms of the two paths.

    Args:
        runs: For each of `PATHS`, and for `CONTROL` if it ran: `losses` and `grad_norms`, one per
            step, and `levers`.

    Raises:
        ValueError: The paths did not do the same steps.
    """
    fused, plain = (runs[path] for path in PATHS)
    control = runs.get(CONTROL)
    for run in (fused, control or plain):
        for name in ("losses", "grad_norms"):
            if len(run[name]) != len(plain[name]) or not run[name]:
                counts = f"{len(run[name])} and {len(plain[name])}"
                raise ValueError(f"{name}: {counts} steps instead of the same number")
        theirs, twins = _settings(run["levers"]), _settings(plain["levers"])
        if theirs != twins:
            raise ValueError(f"the plans differ: {theirs} and {twins}")
    losses = _largest(fused["losses"], plain["losses"])
    first, last = fused["losses"][0], fused["losses"][-1]
    return {
        "steps": len(fused["losses"]),
        "loss_difference": losses,
        "grad_norm_difference": _largest(fused["grad_norms"], plain["grad_norms"]),
        "from_control": {
            path: _largest(runs[path]["losses"], control["losses"]) for path in PATHS if control
        },
        "first_loss": {path: runs[path]["losses"][0] for path in PATHS},
        "final_loss": {path: runs[path]["losses"][-1] for path in PATHS},
        "loss_fell_by": first - last,
        "loss_fell_share": (first - last) / first,
    }


def _settings(levers: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that both plans must share."""
    settings = {name: levers[name] for name in SAME}
    sizes = [settings.pop(name) for name in SAME[:2]]
    return {"effective_batch_size": math.prod(sizes), **settings}


def _largest(values: Sequence[float], references: Sequence[float]) -> dict[str, Any]:
    """Return the largest relative difference and its step, from 1; infinite for NaN or inf."""
    relative = [
        abs(a - b) / abs(b) if math.isfinite(a) and math.isfinite(b) and b else math.inf
        for a, b in zip(values, references, strict=True)
    ]
    largest = max(relative)
    return {"relative": largest, "step": relative.index(largest) + 1}


def compare_gradients(tensors: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Return relative errors of both paths' gradients: worst, median, all together, by kind.

    Args:
        tensors: For each adapter tensor by name: `reference`, the norm of its gradient, and for
            each of `PATHS` the norm of that path's difference from it.

    Raises:
        ValueError: There are no tensors, or a reference gradient is zero.
    """
    flat = [name for name, norms in tensors.items() if not norms["reference"] > 0]
    if flat or not tensors:
        raise ValueError(f"no gradient to compare with: {', '.join(flat) or 'no tensors'}")
    whole = math.hypot(*(norms["reference"] for norms in tensors.values()))
    result: dict[str, Any] = {"tensors": len(tensors)}
    kinds: dict[str, dict[str, float]] = {}
    for path in PATHS:
        errors = {name: _error(norms[path], norms["reference"]) for name, norms in tensors.items()}
        worst = max(errors, key=errors.__getitem__)
        result[path] = {
            "max": errors[worst],
            "worst": worst,
            "median": statistics.median(errors.values()),
            "whole": _error(math.hypot(*(norms[path] for norms in tensors.values())), whole),
        }
        for name, error in errors.items():
            of_kind = kinds.setdefault(_kind(name), dict.fromkeys(PATHS, 0.0))
            of_kind[path] = max(of_kind[path], error)
    return result | {"kinds": kinds}


def _error(difference: float, norm: float) -> float:
    return difference / norm if math.isfinite(difference) else math.inf


def _kind(name: str) -> str:
    found = _KIND.search(name)
    return f"{found[1]} {found[2]}" if found else name


def verdicts(results: dict[str, Any]) -> dict[str, bool]:
    """Return every criterion that the results can be checked against, and whether it holds."""
    answers = {}
    if training := results.get("training"):
        found = compare_training(training)
        answers["loss within 1 % at every step"] = (
            found["loss_difference"]["relative"] <= LOSS_TOLERANCE
        )
        answers["loss fell by 5 % or more"] = found["loss_fell_share"] >= MOVED
    for model, measured in results.get("gradients", {}).items():
        errors = compare_gradients(measured["tensors"])
        fused, plain = errors[FUSED], errors[PLAIN]
        within = f"{model}: fused error within 1e-2"
        answers[f"{within}, all together"] = fused["whole"] <= GRADIENT_TOLERANCE
        answers[f"{within}, worst tensor"] = fused["max"] <= GRADIENT_TOLERANCE
        answers[f"{model}: no worse than plain"] = all(
            fused[name] <= plain[name] for name in ("whole", "max")
        )
    return answers


def report(results: dict[str, Any]) -> str:
    """Return all results as one table."""
    machine = results["machine"]
    device = f"{machine['gpu']}, driver {machine['driver']}" if machine["gpu"] else "CPU"
    versions = ", ".join(f"{name} {is_}" for name, is_ in machine["versions"].items() if is_)
    lines: list[tuple[str, ...]] = [("", *PATHS, "largest difference")]
    if training := results.get("training"):
        lines += _training_lines(results, training)
    for model, measured in results.get("gradients", {}).items():
        lines += _gradient_lines(model, measured)
    whole = [line for line in lines if len(line) > 1]
    widths = [max(len(line[i]) for line in whole if len(line) > i) for i in range(len(whole[0]))]
    text = [f"\n{machine['date']}  {device}", versions, ""]
    for line in lines:
        if len(line) == 1:
            text += ["", line[0]]
            continue
        cells = [f"{cell:>{width}}" for cell, width in zip(line[1:], widths[1:], strict=False)]
        text.append("  ".join([f"{line[0]:<{widths[0]}}", *cells]).rstrip())
    text.append("")
    text += [f"{name}: {'yes' if is_so else 'no'}" for name, is_so in verdicts(results).items()]
    text += [f"failed: {what}: {why}" for what, why in results["failed"].items()]
    return "\n".join(text)


def _training_lines(
    results: dict[str, Any], training: dict[str, dict[str, Any]]
) -> list[tuple[str, ...]]:
    found, arguments = compare_training(training), results["arguments"]
    what = (
        f"training {arguments['shape']}: {found['steps']} steps of {arguments['sequences']} "
        f"sequences out of {arguments['rows']}, learning rate {arguments['learning_rate']:g}"
    )
    norms = [f"{max(training[path]['grad_norms']):.4f}" for path in PATHS]
    speeds = [f"{training[path]['tokens_per_second']:,.0f}" for path in PATHS]
    fell = f"{found['loss_fell_by']:.4f} ({found['loss_fell_share']:.1%})"
    return [
        (what,),
        ("loss of the first step", *(f"{found['first_loss'][path]:.4f}" for path in PATHS), NONE),
        ("loss of the last step", *(f"{found['final_loss'][path]:.4f}" for path in PATHS), NONE),
        ("loss of any step", NONE, NONE, _difference(found["loss_difference"])),
        *_control_line(found["from_control"]),
        ("the loss fell by", fell, NONE, NONE),
        ("largest gradient norm", *norms, _difference(found["grad_norm_difference"])),
        ("tokens/s", *speeds, NONE),
    ]


def _control_line(from_control: dict[str, Any]) -> list[tuple[str, ...]]:
    if not from_control:
        return []
    return [("  against fp32", *(_difference(each) for each in from_control.values()), NONE)]


def _difference(found: dict[str, Any]) -> str:
    return f"{found['relative']:.2e} at step {found['step']}"


def _gradient_lines(model: str, measured: dict[str, Any]) -> list[tuple[str, ...]]:
    errors = compare_gradients(measured["tensors"])
    what = (
        f"gradients {model}, {measured['layers']} layers: {measured['tokens']:,} tokens of "
        f"{measured['text']}; |g - reference| / |reference|"
    )
    lines: list[tuple[str, ...]] = [(what,)]
    words = {"whole": "all tensors together", "max": "worst tensor", "median": "median tensor"}
    for name, label in words.items():
        lines.append((label, *(f"{errors[path][name]:.2e}" for path in PATHS)))
    for kind, of_kind in errors["kinds"].items():
        lines.append((f"  worst {kind}", *(f"{of_kind[path]:.2e}" for path in PATHS)))
    losses = measured["losses"]
    lines.append(
        (
            "loss, the reference's last",
            *(f"{losses[path]:.5f}" for path in PATHS),
            f"{losses['reference']:.5f}",
        )
    )
    return lines


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(report(json.loads(Path(argument).read_text(encoding="utf-8"))))
