"""The names in the source of Python's standard library, each with its role in the function.

A row is a short function, tokenised by `tokenize`, without docstring and comments. The same name can be a
parameter, a variable or an attribute: the tokens around it determine the role.
"""

import ast
import builtins
import io
import keyword
import tokenize
from collections.abc import Iterator, Sequence

from datasets import Dataset

from gradacc_hf.embedded.stdlib import Row, in_two, read_library

IDENTIFIERS_FORMAT = 1  # raise it when the rows of identifiers() change: older cache files are then unused
FUNCTION_TOKENS = range(12, 65)  # tokens of a function that becomes a row
MAX_LITERAL_CHARS = 20  # characters of a literal; longer ones become "..."

_Function = ast.FunctionDef | ast.AsyncFunctionDef
_Position = tuple[int, int]  # line from 1, column from 0
_LAYOUT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def identifiers() -> tuple[Dataset, Dataset]:
    """Return (train, validation) of `tokens`, `tags`, `text` (the joined tokens) and `module` (dotted).

    Tags are IOB2: B-ROLE for a name, O for keywords, operators and literals. A dotted module (`os.path`) is
    one entity, B-import I-import I-import. Names bound in an inner function count as bound in the outer one.
    All rows of a module are in training, or all in validation. The roles:

    parameter: a parameter of the function.
    variable: bound in the function.
    global: bound in the module.
    function, class, import: bound by def, class or import.
    builtin: a name of `builtins`.
    attribute: after a dot.
    method: an attribute that is called.
    keyword: the name of an argument in a call.
    """
    columns = ["text", "tokens", "tags", "module"]
    rows = read_library("identifiers", IDENTIFIERS_FORMAT, columns, function_rows)
    return in_two(rows, by="module")


def function_rows(text: str, tree: ast.Module, parts: tuple[str, ...]) -> Iterator[Row]:
    """Yield a row for each function of a module."""
    name, lines = ".".join(parts).removesuffix(".__init__"), text.split("\n")  # split as ast counts lines
    outside = dict.fromkeys(dir(builtins), "builtin") | _bindings(tree.body, "global")
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    dotted = {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
    dotted |= {node.module for node in imports if isinstance(node, ast.ImportFrom) and node.module}
    for owner in (tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))):
        for function in owner.body:
            if isinstance(function, _Function):
                source = "\n".join(lines[function.lineno - 1 : function.end_lineno])
                if source.isascii():  # otherwise ast counts bytes, and tokenize characters
                    tokens, tags = _tagged(function, source, outside)
                    if len(tokens) in FUNCTION_TOKENS:
                        tags = _joined(tokens, tags, dotted)
                        yield {"text": " ".join(tokens), "tokens": tokens, "tags": tags, "module": name}


def _bindings(body: Sequence[ast.stmt], role: str) -> dict[str, str]:
    """Return the roles of names by the statements that bind them; assigned names have the role `role`.

    For a module ("global"), inner functions and classes are left out. For a function ("variable"), they
    count.
    """
    found: dict[str, str] = {}
    nodes: list[ast.AST] = list(body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name.partition(".")[0]: "import" for alias in node.names}
        elif isinstance(node, _Function | ast.ClassDef):
            found[node.name] = "class" if isinstance(node, ast.ClassDef) else "function"
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.setdefault(node.id, role)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            found.setdefault(node.name, role)
        if role == "variable" or not isinstance(node, _Function | ast.ClassDef):
            nodes += ast.iter_child_nodes(node)
    return found


def _tagged(function: _Function, source: str, outside: dict[str, str]) -> tuple[list[str], list[str]]:
    """Return the tokens of a function and the tag of each, B-ROLE or O."""
    nodes = list(ast.walk(function))
    elsewhere = {name for node in nodes if isinstance(node, ast.Global) for name in node.names}
    inner = {n: role for n, role in _bindings(function.body, "variable").items() if n not in elsewhere}
    inner |= {node.arg: "parameter" for node in nodes if isinstance(node, ast.arg)}
    known = dict.fromkeys(elsewhere, "global") | outside | inner
    placed, literals = _placed(nodes)
    body = function.body[0]
    docstring = (body.lineno, body.col_offset) if ast.get_docstring(function) is not None else None
    tokens, tags, skip_to = [], [], (0, 0)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        position = (token.start[0] + function.lineno - 1, token.start[1])
        if token.type in _LAYOUT or position < skip_to:
            continue
        text, role = token.string, None
        if position == docstring:
            skip_to = literals[position]
            continue
        if position in literals:
            skip_to = literals[position]
            if token.type != tokenize.STRING:  # since Python 3.12, the start of an f-string
                text = _segment(source, token.start, skip_to, function.lineno)
            text = text if len(text) <= MAX_LITERAL_CHARS else '"..."'
        elif token.type == tokenize.NAME and not keyword.iskeyword(text):
            role = "function" if tokens[-1:] == ["def"] else placed.get(position) or known.get(text)
        tokens.append(text)
        tags.append(f"B-{role}" if role else "O")
    return tokens, tags


def _segment(source: str, start: _Position, end: _Position, first_line: int) -> str:
    """Return a literal of the source of a function. `start` counts lines from 1, `end` from `first_line`."""
    lines = source.split("\n")[start[0] - 1 : end[0] - first_line + 1]
    lines[-1] = lines[-1][: end[1]]
    lines[0] = lines[0][start[1] :]
    return "\n".join(lines)


def _placed(nodes: Sequence[ast.AST]) -> tuple[dict[_Position, str], dict[_Position, _Position]]:
    """Return the roles that follow from the position of a name, and the start and end of literals."""
    called = {id(node.func) for node in nodes if isinstance(node, ast.Call)}
    roles: dict[_Position, str] = {}
    literals: dict[_Position, _Position] = {}
    for node in nodes:
        if isinstance(node, ast.Attribute):
            end = node.end_lineno or 0, (node.end_col_offset or 0) - len(node.attr)
            roles[end] = "method" if id(node) in called else "attribute"
        elif isinstance(node, ast.keyword):
            roles[node.lineno, node.col_offset] = "keyword"
        elif isinstance(node, ast.alias):
            roles[node.lineno, node.col_offset] = "import"
        elif isinstance(node, ast.ImportFrom):
            roles[node.lineno, node.col_offset + len("from ")] = "import"
        elif isinstance(node, ast.JoinedStr) or (
            isinstance(node, ast.Constant) and isinstance(node.value, str | bytes)
        ):
            literals[node.lineno, node.col_offset] = (node.end_lineno or 0, node.end_col_offset or 0)
    return roles, literals


def _joined(tokens: list[str], tags: list[str], dotted: set[str]) -> list[str]:
    """Return the tags, with the parts of an imported dotted name as one entity."""
    for start in range(len(tokens)):
        name, end = tokens[start], start + 1
        while tags[start] == "B-import" and tokens[end : end + 1] == ["."]:
            name, end = f"{name}.{tokens[end + 1]}", end + 2
            if name in dotted:
                tags[start + 1 : end] = ["I-import"] * (end - start - 1)
    return tags
