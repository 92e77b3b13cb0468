"""One bound on the memory that all requests in flight hold together."""

from __future__ import annotations

from types import TracebackType

DEFAULT_BYTES = 512 << 20


class Budget:
    """Bytes that may be held, and are."""

    def __init__(self, total: int = DEFAULT_BYTES) -> None:
        self.total = total
        self.used = 0


class Share:
    """One holder's part of a :class:`Budget`; all of it is given back at the end of its context."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.size = 0

    def take(self, size: int) -> bool:
        """False, and nothing taken, when that would exceed the budget."""
        if self.budget.used + size > self.budget.total:
            return False
        self.budget.used += size
        self.size += size
        return True

    def free(self) -> None:
        """Give all of it back."""
        self.budget.used -= self.size
        self.size = 0

    def __enter__(self) -> Share:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.free()
