"""What a case must keep to, beside running at all: a mix-up of devices is an error of its own."""

from __future__ import annotations

from typing import Any

LARGEST_WIDE = 1e9  # FLOPs of a product in float32 outside of the losses; theirs have 2e9 and more at full size
LOSSES = "losses/"
ROOM = 1.02  # over what was recorded, for kernels and memory


def broken_rules(parts: dict[str, Any], recorded: dict[str, Any] | None) -> list[str]:
    """The rules that what was measured breaks, each in a line."""
    lines = []
    for part, found in parts.items():
        lines += [
            f"{part}: a product in float32 of {flops / 1e9:.1f} GFLOP at {where}"
            for where, flops in found["wide"].items()
            if flops > LARGEST_WIDE and not where.startswith(LOSSES)
        ]
        lines += [f"{part}: {told}" for told in map(not_flash, found["attention"]) if told]
        if recorded is None:
            lines.append(f"{part}: nothing is recorded; see --record")
            continue
        lines += [f"{part}: {told}" for told in over_budget(found, recorded[part])]
    return lines


def not_flash(attention: str) -> str | None:
    """An attention of several queries a row that does not get the flash kernel; KERNEL SHAPES: PLACE."""
    kernel = attention.split(":", maxsplit=1)[0]
    if kernel == "flash":
        return None
    name, shapes = kernel.split(" ", 1)
    queries = int(shapes.split(")")[0].strip("(").split(",")[2])
    return None if queries == 1 else f"attention is computed by the kernel {name}, not flash: {attention}"


def over_budget(found: dict[str, Any], recorded: dict[str, Any]) -> list[str]:
    """Waits, kernels and memory beyond what is recorded."""
    lines = []
    for kind, number in found["waits"].items():
        allowed = recorded["waits"].get(kind, 0)
        if number > allowed:
            before = recorded["places"]
            more = {
                where: f"{count:g} ({before.get(where, 0):g} recorded)"
                for where, count in found["places"].items()
                if where.startswith(kind) and count > before.get(where, 0)
            }
            lines.append(f"the host waits {number:g} times for {kind!r}, {allowed:g} are recorded: {more}")
    for name, unit in (("kernels", 1), ("peak", 2**30)):
        if found[name] > recorded[name] * ROOM:
            lines.append(f"{name} {found[name] / unit:.1f}, {recorded[name] / unit:.1f} are recorded")
    return lines
