"""Numbers and tables as text. Free of torch."""

from collections.abc import Sequence


def bytes_text(size: float) -> str:
    """Return bytes in words, in powers of ten.

    Example:
        >>> [bytes_text(size) for size in (512, 12_700_000, 26_950_000_000)]
        ['512 B', '12.7 MB', '26.95 GB']
    """
    if size < 1000:
        return f"{size:.0f} B"
    if size < 1e6:
        return f"{size / 1e3:.1f} kB"
    return f"{size / 1e6:.1f} MB" if size < 1e9 else f"{size / 1e9:.2f} GB"


def aligned(rows: Sequence[Sequence[str]], *, words: int) -> str:
    """Return rows of cells as lines with columns under each other.

    Args:
        rows: the first is the heading; all of one length.
        words: leading columns that are text and stand at the left; the others are numbers.

    Example:
        >>> print(aligned([("kind", "state"), ("smmf", "12")], words=1))
        kind  state
        smmf     12
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(
            cell.ljust(width) if place < words else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)
