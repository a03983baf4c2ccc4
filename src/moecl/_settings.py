"""What every group of settings has in common: strict, frozen, and its errors in one line."""

from typing import Any, cast

from pydantic import BaseModel, ConfigDict, ValidationError

# pydantic has no public name for it, and type(BaseModel) is no base class to mypy.
from pydantic._internal._model_construction import ModelMetaclass

from moecl._explain import explain, settings
from moecl._yaml import Document


class _OneLineErrors(ModelMetaclass):
    def __call__(self, *args: Any, **fields: Any) -> Any:
        """Construct, with a ConfigError of one line in place of pydantic's."""
        try:
            return super().__call__(*args, **fields)
        except ValidationError as error:
            model = cast(type[Settings], self)
            known = settings(model, model.chosen(fields))
            raise explain(error, known, Document(self.__name__)) from None


class Settings(BaseModel, metaclass=_OneLineErrors):
    # Strict: YAML already has types, and "3" or true for a number is a mistake.
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    @classmethod
    def chosen(cls, fields: dict[str, Any]) -> dict[str, type[BaseModel]]:
        """Which settings stand under a key whose kind `fields` choose."""
        return {}
