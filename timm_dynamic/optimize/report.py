"""What `optimize` did and what it left, in words."""


class Report(list):
    """Lines of plain English."""

    def __str__(self) -> str:
        return "\n".join(self)

    def add_left(self, left: dict[str, str]) -> None:
        """One line for all modules, by name, that were left for the same reason."""
        reasons: dict[str, list[str]] = {}
        for name, reason in left.items():
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            self.append(f"left {listed(names)}: {reason}")


def listed(names: list[str], most: int = 3) -> str:
    """Some names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(name or "the model itself" for name in names[:most]) + more


def counted(count: int, noun: str) -> str:
    """`1 block`, `2 blocks`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
