"""A call that has been built and not been sent."""

from collections.abc import Callable
from inspect import Parameter, Signature, signature
from typing import Generic, NamedTuple, TypeVar, get_args

from google.protobuf.message import Message

M = TypeVar("M", bound=Message)
T = TypeVar("T")


class Call(NamedTuple, Generic[M, T]):
    """One unary request, the type of its answer, and how that answer is read.

    Both clients send it, and whoever wants the answer's message itself (to print it, to forward it)
    gives the call to `Client.send`.
    """

    #: Service and method, as in "SearchService/Search".
    method: str
    request: Message
    answer: type[M]
    read: Callable[[M], T]
    #: Sending it twice does no harm, so gRPC may do so while the service is away.
    repeatable: bool = True

    @property
    def path(self) -> str:
        """The method's path on the wire."""
        return f"/ringfort.v1.{self.method}"


def whole(answer: M) -> M:
    """The answer as it came, for messages that are as plain as any value made from them."""
    return answer


def nothing(answer: Message) -> None:
    """The answer says no more than that it was done."""


def method_signature(build: Callable[..., Call[M, T]]) -> Signature:
    """The signature of a method made from `build`, as help() and editors show it."""
    built = signature(build)
    self_first = [Parameter("self", Parameter.POSITIONAL_OR_KEYWORD), *built.parameters.values()]
    returns = get_args(built.return_annotation)[1]
    return built.replace(parameters=self_first, return_annotation=returns)
