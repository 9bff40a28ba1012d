"""Makes a JSON schema one that Prefect's form can show and its server can explain.

The form picks the tab of a union by counting property names, so that kinds with the same fields are taken for one
another; it has no tabs inside a list; and of a wrong value in a union, the server's validator often says no more than
that nothing fits. Four changes of the schema help, and each leaves the plain values valid that recipes are written in:

- A kind is shown under a property name of its own, ``kind_ptq`` in place of ``kind``.
- An item of a list of kinds is shown as an object with one property, ``{"one": item}``.
- A union says which member counts for which kind, so that the error is that member's.
- An unknown property is an error of that property, not of the object that has it.

``plain`` turns what such a form gives back into what recipes are written in.
"""

from collections.abc import Collection, Mapping
from typing import Any

from pydantic import GetJsonSchemaHandler
from pydantic_core import CoreSchema

MARK = "kind_"
ONE = "one"

Schema = dict[str, Any]


def plain(value: Any) -> Any:
    """What a form gave, as recipes are written."""
    if isinstance(value, Mapping):
        if set(value) == {ONE}:
            return plain(value[ONE])
        return {"kind" if key.startswith(MARK) else key: plain(each) for key, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, list | tuple) else value


def shown(value: Any) -> Any:
    """The reverse of ``plain``, for the values that a form starts with."""
    if isinstance(value, Mapping):
        return {f"{MARK}{each}" if key == "kind" else key: shown(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [{ONE: shown(each)} if isinstance(each, Mapping) and "kind" in each else shown(each) for each in value]
    return value


class FormSchema:
    """An annotation: the type's JSON schema is changed as this module says; validation in Python is not.

    ``vague`` are the titles of the members of the outermost union that say less about what is wrong in them: when two
    members say the same, the validator believes neither.
    """

    def __init__(self, *, vague: Collection[str]) -> None:
        self._vague = vague

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> Schema:
        """Called by pydantic."""
        schema = handler(core)
        _Changes(handler, self._vague).visit(schema)
        return schema


class _Changes:
    def __init__(self, handler: GetJsonSchemaHandler, vague: Collection[str]) -> None:
        self._handler = handler
        self._vague = vague
        self._seen: dict[str, str | None] = {}
        """Reference -> its kind."""

    def visit(self, schema: Schema, *, precise: bool = True) -> None:
        """Change a schema and all that it refers to."""
        if "$ref" in schema:
            self._kind_of(schema["$ref"])
        for member in schema.get("anyOf", ()):
            self.visit(member)
        for each in schema.get("properties", {}).values():
            self.visit(each, precise=schema.get("title") not in self._vague)
        if "items" in schema:
            self.visit(schema["items"])
            if "dependentSchemas" in schema["items"]:
                schema["items"] = _item(schema["items"])
        elif precise and len(kinds := self._kinds(schema)) > 1:
            schema["dependentSchemas"] = _by_kind(kinds)
        if "default" in schema:
            schema["default"] = shown(schema["default"])

    def _kinds(self, schema: Schema) -> dict[str, str]:
        """Kind -> reference of the members of a union."""
        references = [member["$ref"] for member in schema.get("anyOf", ()) if "$ref" in member]
        kinds = {self._kind_of(reference): reference for reference in references}
        return {kind: reference for kind, reference in kinds.items() if kind is not None}

    def _kind_of(self, reference: str) -> str | None:
        if reference not in self._seen:
            target = self._handler.resolve_ref_schema({"$ref": reference})
            properties = target.get("properties", {})
            kind = properties.get("kind", {}).get("const")
            self._seen[reference] = kind
            if kind is not None:
                del properties["kind"]
                mark = {"const": kind, "default": kind, "title": "Kind", "type": "string"}
                target["properties"] = {f"{MARK}{kind}": mark, **properties}
                target["patternProperties"] = {"^kind$": {"const": kind}}
            if target.get("additionalProperties") is False and target.get("title") not in self._vague:
                target["additionalProperties"] = {"allOf": [False]}  # the same, but the error names the property
            self.visit(target)
        return self._seen[reference]


def _item(union: Schema) -> Schema:
    """An object that shows the union as its property, and that may be a plain member of it too."""
    return {
        "type": "object",
        "properties": {ONE: {**union, "title": "Kind"}},
        "anyOf": [{"required": [ONE], "maxProperties": 1}, *union["anyOf"]],
        "dependentSchemas": union["dependentSchemas"],
    }


def _by_kind(kinds: dict[str, str]) -> Schema:
    """For a value with a kind: it must be one of these, and fit that member."""
    members = [
        {"if": {"properties": {"kind": {"const": kind}}}, "then": {"$ref": reference}}
        for kind, reference in kinds.items()
    ]
    marks = {f"{MARK}{kind}": {"$ref": reference} for kind, reference in kinds.items()}
    return {"kind": {"properties": {"kind": {"enum": list(kinds)}}, "allOf": members}, **marks}
