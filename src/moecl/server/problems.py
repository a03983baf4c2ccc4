"""What goes wrong, as OpenAI's error objects: its official client raises its own exceptions for them."""

import json
import re
from collections.abc import Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.responses import Response

from moecl.errors import BusyError, MoECLError, StoreError, TaskError, near

KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
UNION_MEMBERS = ("str", "int", "float", "bool", "none")  # which pydantic puts into the place of a fault


class ApiError(Exception):
    """An answer that is a problem."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry_after: int = 0
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after = retry_after

    @property
    def kind(self) -> str:
        return KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    def body(self) -> dict[str, Any]:
        found = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": found}

    def response(self) -> Response:
        headers = {"Retry-After": str(self.retry_after)} if self.retry_after else {}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        # ASCII: a message may quote halves of surrogate pairs, which have no UTF-8.
        return Response(json.dumps(self.body()), self.status, headers, "application/json")


def from_ours(error: Exception, param: str | None = None) -> ApiError:
    """The answer for an error of the engine or the store."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, TaskError):
        return ApiError(404, str(error), param="model", code="model_not_found")
    if isinstance(error, StoreError | BusyError):
        return ApiError(503, "the model cannot be read from its store; the server's log says why", code="store")
    if isinstance(error, MoECLError):
        return ApiError(400, str(error), param=param)
    return ApiError(500, "a fault of the server; its log says more", code="internal_error")


def from_validation(error: RequestValidationError) -> ApiError:
    """The first thing that is wrong: an unknown field before all others, of a union's complaints the nearest one."""
    urgency = lambda one: (one["type"] != "extra_forbidden", one["type"].endswith("_type"), -len(one["loc"]))  # noqa: E731
    first = min(error.errors(), key=urgency)
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON ({first.get('ctx', {}).get('error', 'broken')})")
    param = place(first["loc"][1:])
    if first["type"] == "extra_forbidden":
        missing = [str(one["loc"][-1]) for one in error.errors() if one["type"] == "missing"]
        hint = near(str(first["loc"][-1]), missing) or "; leave it out"
        return ApiError(400, f"{param}: not supported{hint}", param=param, code="unsupported_parameter")
    if not param:
        return ApiError(400, "the body is no JSON object; send one with the header Content-Type: application/json")
    if first["type"] == "missing":
        return ApiError(400, f"{param}: is missing", param=param)
    if first["type"] == "too_short":
        return ApiError(400, f"{param}: is empty; give one at least", param=param)
    found = "" if isinstance(first["input"], dict | list) else f", not {first['input']!r:.80}"
    wanted = re.sub(r"^\w+ should ", "", first["msg"]).replace(" after validation", "")
    if isinstance(first["input"], dict) and first["type"] == "string_type":
        wanted = "be a string; objects go into a list"
    return ApiError(400, f"{param}: should {wanted}{found}", param=param)


def place(keys: Sequence[Any]) -> str:
    found = ""
    for key in keys:
        if isinstance(key, int):
            found += f"[{key}]"
        elif key not in UNION_MEMBERS and not set("[(-") & set(key):
            found += f".{key}" if found else key
    return found[:100]
