"""Prints configs/all_fields.yaml: every setting with its meaning and its default."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import textwrap

import yaml

from pipeline.config import Config


def field_texts(cls: type) -> dict[str, str]:
    """The docstring under each field of a dataclass."""
    module = inspect.getmodule(cls)
    assert module is not None
    body = ast.parse(inspect.getsource(module)).body
    fields = next(node for node in body if isinstance(node, ast.ClassDef) and node.name == cls.__name__).body
    texts = {}
    for field, text in itertools.pairwise(fields):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            assert isinstance(field.target, ast.Name)
            texts[field.target.id] = " ".join(str(text.value.value).split())
    return texts


def describe(cls: type, indent: str = "") -> str:
    """YAML of the class's defaults with each field's text above it."""
    lines = []
    texts = field_texts(cls)
    for field in dataclasses.fields(cls):
        lines += textwrap.wrap(texts[field.name], 110, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
        factory = field.default_factory
        if isinstance(factory, type) and dataclasses.is_dataclass(factory):
            lines += [f"{indent}{field.name}:", describe(factory, indent + "  ")]
        else:
            value = field.default if factory is dataclasses.MISSING else factory()
            text = yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()
            lines.append(f"{indent}{field.name}: {text}")
    return "\n".join(lines)


if __name__ == "__main__":
    print("# Every setting with its default.  Written by `python -m pipeline.cli.all_fields`.")
    print(describe(Config))
