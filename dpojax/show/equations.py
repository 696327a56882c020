"""The LaTeX of the objectives' docstrings as a line of Unicode."""

import re

NAMED = {
    "alpha": "α", "beta": "β", "gamma": "γ", "delta": "δ", "epsilon": "ε", "lambda": "λ", "pi": "π", "sigma": "σ",
    "tau": "τ", "ell": "ℓ", "sum": "Σ", "nabla": "∇", "propto": "∝", "to": "→", "le": "≤", "ge": "≥", "cdot": "·",
    "in": "∈", "subseteq": "⊆", "dots": "...", "infty": "∞", "{": "{", "}": "}", "|": "‖", "_": "_",
    "log": "log", "exp": "exp", "max": "max", "min": "min",
}  # fmt: skip
SPACES = {",": " ", ";": " ", "quad": "   ", "qquad": "   ", "!": "", "left": "", "right": "", "big": "", "Big": ""}
ACCENTS = {"bar": "\N{COMBINING MACRON}", "hat": "\N{COMBINING CIRCUMFLEX ACCENT}"}
UPRIGHT = ("mathrm", "text", "operatorname")
FRACTIONS = {"1/2": "½"}
RAISED = dict(zip("0123456789+-()eiflrwn", "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ᵉⁱᶠˡʳʷⁿ", strict=True))
NAME = r"[0-9]+|\|\w+\||\w[\u0300-\u036f]?(_\w+)?"
"""What needs no brackets in a fraction: a number, a letter with its accent and subscript, a length."""

TOKEN = re.compile(r"\\[A-Za-z]+|\\.|\s+|.", re.DOTALL)
CASES = re.compile(r"\\begin\{cases\}(.*?)\\end\{cases\}", re.DOTALL)


def readable(latex: str) -> str:
    r"""An equation as text: ``\frac{a}{b}`` is a/b, Greek letters are themselves, clauses are parted by two spaces.

    Raises:
      KeyError: a command that no docstring used when this was written; it belongs in the tables above.

    >>> readable(r"-\log \sigma\left(\frac{\beta}{|y_w|} h\right), \qquad e^{-\beta h} + \tfrac12 \bar h^2")
    '-log σ(β/|y_w| h),   e^(-β h) + ½ h̄²'
    """
    text = CASES.sub(lambda match: _cases(match[1]), latex)
    text, _ = _group(TOKEN.findall(text), 0)
    # Runs of two and more spaces part clauses, all else is one space and none inside brackets.
    text = re.sub(r" {2,}", lambda run: "   " if len(run[0]) > 2 else " ", text)
    return re.sub(r"(?<=[(\[]) +| +(?=[)\],])", "", text).strip()


def _cases(body: str) -> str:
    rows = [row.split("&") for row in body.split(r"\\") if row.strip()]
    return ", ".join(f"{value.strip()} ({condition.strip()})" for value, condition in rows)


def _group(tokens: list[str], at: int) -> tuple[str, int]:
    """The text up to the brace that closes the group, and where it closes."""
    parts: list[str] = []
    while at < len(tokens) and tokens[at] != "}":
        part, at = _item(tokens, at)
        parts.append(part)
    return "".join(parts), at


def _argument(tokens: list[str], at: int) -> tuple[str, int]:
    """The next group or token, past spaces."""
    while tokens[at].isspace():
        at += 1
    if tokens[at] == "{":
        text, at = _group(tokens, at + 1)
        return text.strip(), at + 1
    return _item(tokens, at)


def _item(tokens: list[str], at: int) -> tuple[str, int]:
    token, at = tokens[at], at + 1
    if token.isspace():
        return " ", at
    if token == "{":
        text, at = _group(tokens, at)
        return text, at + 1
    if token in "^_":
        text, at = _argument(tokens, at)
        return (_raised(text) if token == "^" else "_" + _bracketed(text, r"\(?[\w<]+\)?")), at
    if not token.startswith("\\"):
        return {"'": "′"}.get(token, token), at
    name = token[1:]
    if name in ("frac", "tfrac"):
        return _fraction(tokens, at)
    if name in ACCENTS:
        text, at = _argument(tokens, at)
        return text + ACCENTS[name], at
    if name in UPRIGHT:
        # Spaces inside count, unlike those of formulas.
        closing = tokens.index("}", at)
        text = "".join(tokens[at + 1 : closing])
        return readable(text) if "\\" in text else text, closing + 1
    return (NAMED | SPACES)[name], at


def _fraction(tokens: list[str], at: int) -> tuple[str, int]:
    before = "".join(tokens[: at - 1]).rstrip()
    above, at = _argument(tokens, at)
    below, at = _argument(tokens, at)
    above, below = _bracketed(above, rf"{NAME}|[^-+/]*\([^()]*\)"), _bracketed(below, rf"{NAME}|[^-+/ ]*\([^()]*\)")
    text = FRACTIONS.get(f"{above}/{below}", f"{above}/{below}")
    if before.endswith(r"\log"):
        text = f"({text})"
    return text + (" " if at < len(tokens) and tokens[at].startswith("\\") and tokens[at] != r"\right" else ""), at


def _raised(text: str) -> str:
    if all(char in RAISED for char in text):
        return "".join(RAISED[char] for char in text)
    return "^" + _bracketed(text, r"\w+")


def _bracketed(text: str, plain: str) -> str:
    return text if re.fullmatch(plain, text) else f"({text})"
