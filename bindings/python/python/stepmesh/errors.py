"""What stepmesh raises. Every class is a :class:`StepmeshError`; most are one of Python's own besides."""


class StepmeshError(Exception):
    """Base of all."""


class InvalidArgument(StepmeshError, ValueError):
    """An argument's value; the message names it. Nothing has changed."""


class InvalidType(StepmeshError, TypeError):
    """An argument's type, or a tensor's element type; the message names it. Nothing has changed."""


class UnknownTicket(StepmeshError, LookupError):
    """A ticket or handler that is not outstanding: consumed, of an earlier transfer, or another mesh's."""


class WouldBlock(StepmeshError, BlockingIOError):
    """The microbatch is in use: wait for its ticket first."""


class NotLinked(StepmeshError, ConnectionError):
    """Not every instance of the other side is linked, yet or any more."""


class Timeout(StepmeshError, TimeoutError):
    """The time is over; what was waited for is still outstanding."""


class PeerLost(StepmeshError, ConnectionError):
    """A peer was lost before it answered; the message names it."""


class PeerFailed(StepmeshError, RuntimeError):
    """A peer could not process the request; the message says why."""


class Cancelled(StepmeshError):
    """The ticket was cancelled, or joining was interrupted."""


class Refused(StepmeshError, ConnectionError):
    """The scheduler refused this member: wrong token, taken rank, another layout or transport than the others."""


class SchedulerLost(StepmeshError, ConnectionError):
    """The scheduler cannot be reached, or is gone."""


class MemoryLimit(StepmeshError, MemoryError):
    """The slots would take more registered memory than allowed."""


class TransportFailed(StepmeshError, OSError):
    """The provider failed: no such device, no memory, a broken system call."""


class Closed(StepmeshError, RuntimeError):
    """The mesh is closed, not joined yet, or the interpreter ends."""


class Forked(StepmeshError, RuntimeError):
    """The mesh belongs to the process that this one was forked from: join after forking."""


class DeviceUnsupported(StepmeshError, NotImplementedError):
    """Device memory, which this build does not move."""


class WrongRole(StepmeshError, RuntimeError):
    """A call of the other side's."""
