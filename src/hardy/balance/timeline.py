"""When each rank works in a step, and a picture of it in letters."""

from hardy.balance.plan import Plan, step_time


def timeline(made: Plan, *, width: int = 60, most_ranks: int = 32) -> list[str]:
    """Return one line for each rank: a letter for each micro-batch as long as it takes, dots for waiting."""
    lines: list[str] = []
    for rank in range(min(made.world_size, most_ranks)):
        cells = ["."] * width
        for letter, (start, stop) in enumerate(spans(made, rank)):
            first = round(start / made.cost * width)
            last = max(round(stop / made.cost * width), first + 1)
            cells[first:last] = [chr(ord("a") + letter % 26)] * (min(last, width) - first)
        lines.append(f"rank {rank:>3} |{''.join(cells)}| {made.rank_times[rank] / made.cost:.0%}")
    if made.world_size > most_ranks:
        lines.append(f"... and {made.world_size - most_ranks} more ranks")
    return lines


def spans(made: Plan, rank: int) -> list[tuple[float, float]]:
    """Return when `rank` works on each of its micro-batches, from the step's begin.

    In lock-step each slot begins when the one before is over everywhere; a pipeline's bubbles count as the
    last micro-batch's.
    """
    found: list[tuple[float, float]] = []
    now = 0.0
    for slot_index, slot in enumerate(made.slots):
        batch = made.mine(slot_index, rank)
        if batch is not None and batch.cost:
            found.append((now, now + batch.cost))
        if made.objective == "lock_step":
            now += step_time([slot], "lock_step")
        elif batch is not None:
            now += batch.cost
    if found and made.objective == "free_running":
        begin = found[-1][0]
        found[-1] = (begin, max(found[-1][1], made.rank_times[rank]))
    return found
