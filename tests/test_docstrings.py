"""Every public name says what it takes, returns and raises, in one form: Google's, with the names of its signature."""

import ast
import dataclasses
import inspect
import re
import textwrap

import pytest

import opsdl

FUNCTIONS = {name: value for name in opsdl.__all__ if inspect.isfunction(value := getattr(opsdl, name))}
FUNCTIONS |= {
    f"reference.{name}": value
    for name, value in vars(opsdl.reference).items()
    if inspect.isfunction(value) and value.__module__ == opsdl.reference.__name__ and not name.startswith("_")
}
CLASSES = {name: value for name in opsdl.__all__ if inspect.isclass(value := getattr(opsdl, name))}
METHODS = {
    f"{name}.{attribute}": value
    for name, cls in CLASSES.items()
    for attribute, value in vars(cls).items()
    if inspect.isfunction(value) and not attribute.startswith("_")
}
SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Raises|Example|Source):$", re.M)
ENTRY = re.compile(r"^    \*{0,2}(\w+)(?: \([^)]*\))?:", re.M)


def sections(thing):
    """Section -> its text, of a docstring; "" is what comes before the first."""
    parts = SECTION.split(inspect.getdoc(thing) or "")
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def entries(text):
    """The names that a section explains, in its order."""
    return ENTRY.findall(text)


def parameters(thing):
    return [name for name in inspect.signature(thing).parameters if name not in ("self", "cls")]


def raises(thing):
    """Whether the function's own lines raise something."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(thing)))
    return any(isinstance(node, ast.Raise) for node in ast.walk(tree))


def summary_is_a_sentence(thing):
    first, *rest = sections(thing)[""].splitlines() or [""]
    return first.endswith((".", "?")) and (not rest or not rest[0].strip())


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name):
    function = FUNCTIONS[name]
    assert summary_is_a_sentence(function), f"{name}: expected one line that ends with a period, then an empty one"
    found = sections(function)
    assert entries(found.get("Args", "")) == parameters(function), f"{name}: Args"
    if inspect.signature(function).return_annotation not in (None, "None"):
        assert found.keys() & {"Returns", "Yields"}, f"{name}: Returns"
    if raises(function):
        assert "Raises" in found, f"{name}: Raises"


@pytest.mark.parametrize("name", METHODS)
def test_methods(name):
    """A method may be explained in a sentence; if its arguments are, then all of them."""
    method = METHODS[name]
    assert summary_is_a_sentence(method), f"{name}: expected one line that ends with a period, then an empty one"
    assert entries(sections(method).get("Args", "")) in ([], parameters(method)), f"{name}: Args"


@pytest.mark.parametrize("name", CLASSES)
def test_classes(name):
    """A class explains the arguments of its constructor; a dataclass may call them its attributes."""
    cls = CLASSES[name]
    assert summary_is_a_sentence(cls), f"{name}: expected one line that ends with a period, then an empty one"
    found = sections(cls)
    if dataclasses.is_dataclass(cls):
        explained, expected = found.get("Attributes", found.get("Args", "")), [f.name for f in dataclasses.fields(cls)]
    elif issubclass(cls, Exception):
        return
    else:
        explained, expected = found.get("Args", ""), parameters(cls)
    assert entries(explained) == expected, f"{name}: its arguments"
