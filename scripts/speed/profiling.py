"""Where the time of an LVT step goes: torch.profiler's operators, and its arithmetic against the machine's fastest."""

from collections.abc import Iterator

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from speed.common import (
    BATCH,
    Options,
    Row,
    build_parts,
    choose_random_pixels,
    close_task,
    get_first_phase,
    measure_in_turn,
    open_loop,
    repeat,
    shorten,
    time_steps,
)
from speed.loop import make_bare_step

LARGEST = 12
"""Operators that are listed."""


def profile_step(options: Options) -> Iterator[Row]:
    """Share of each operator in a training step of LVT's second task, and the step's rate beside a matrix product's."""
    steps = 1 if options.small else 3
    small = ["+scale=mini"] if options.small else []
    parts = build_parts(
        *choose_random_pixels(16), "backbone=lvt", "buffer.capacity=500", *small, "scenario.num_tasks=2"
    )
    side = 256 if options.small else 2048
    a, b = torch.randn(side, side), torch.randn(side, side)
    with open_loop(parts) as trainer:
        options.tell("an LVT step")
        first, second = parts.scenario.tasks
        close_task(parts, shorten(first, 200))
        second = shorten(second, steps * BATCH)
        phase = get_first_phase(parts, second)
        step = time_steps(trainer, second, phase)
        step()
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            step()
        with FlopCounterMode(display=False) as counted:
            make_bare_step(parts)()
        values = measure_in_turn({"step": step, "product": repeat(lambda: a @ b, 5)}, options.repetitions)
    events = recorded.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    for event in sorted(events, key=lambda event: -event.self_cpu_time_total)[:LARGEST]:
        share = 100 * event.self_cpu_time_total / total
        note = f"{event.self_cpu_time_total / 1e3 / steps:.1f} ms and {event.count / steps:.0f} calls a step"
        yield Row("profile", f"LVT step, {event.key}", "%", [share], note=note)
    flops = counted.get_total_flops()
    rates = {
        "step": [flops / seconds / 1e9 for seconds in values["step"]],
        "product": [2 * side**3 / seconds / 1e9 for seconds in values["product"]],
    }
    yield Row("profile", f"LVT step, {flops / 1e9:.1f} GFLOP", "GFLOP/s", rates["step"])
    yield Row("profile", f"matrix product of {side} x {side}", "GFLOP/s", rates["product"])
    parts_of_peak = [a / b for a, b in zip(rates["step"], rates["product"])]
    yield Row("profile", "LVT step's arithmetic / a matrix product's", "x", parts_of_peak)
