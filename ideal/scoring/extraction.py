"""What an answer says: its final number, the option it chooses, its text without what does not matter, its code."""

import ast
import re
import string
import unicodedata
from fractions import Fraction

CURRENCY = "$€£¥"
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?![\d])|\d+)"
_SIGN = r"(?<![\w.)\]}])[-+\u2212]"  # after these a minus subtracts
NUMBER = re.compile(
    rf"""(?P<sign>{_SIGN})?[{CURRENCY}]?(?P<inner>(?<=[{CURRENCY}])[-\u2212])?\ ?
    (?:(?:(?P<whole>\d+)\ )?(?<!/)(?P<top>{_DIGITS})\ ?/\ ?(?P<bottom>0*[1-9]\d*)(?![\d/]|[.,]\d)
      |(?P<plain>{_DIGITS}(?:\.\d+)?|(?<!\d)\.\d+))""",
    re.VERBOSE,
)
"""A sign, a currency, thousands separated by commas, decimals; 3/4 and 1 1/2."""
LATEX_FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*([-\u2212]?\d+)\s*\}\s*\{\s*(\d+)\s*\}")
BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
GSM8K = re.compile(r"####[ \t]*(\S.*?)[ \t]*$", re.MULTILINE)
SAID = re.compile(r"\banswer(?:\s+to\s[^.:\n]*?)?(?:\s+(?:is|are|=)|\s*[:=])\s*:?\s*(?=(\S.*))", re.IGNORECASE)


def numbers(text: str) -> list[Fraction]:
    """Every number of `text` in order, exactly. "5-3" are 5 and 3, "x = -3" is -3; a percent sign changes nothing."""
    plain = LATEX_FRACTION.sub(r" \1/\2 ", text).replace("{,}", ",").replace("\\$", "$")
    found = []
    for match in NUMBER.finditer(plain):
        if match["plain"]:
            value = Fraction(match["plain"].replace(",", ""))
        else:
            value = Fraction(int(match["top"].replace(",", "")), int(match["bottom"])) + int(match["whole"] or 0)
        negative = (match["sign"] or "+") in "-\u2212" or match["inner"] is not None
        found.append(-value if negative else value)
    return found


def final_number(text: str) -> Fraction | None:
    """The number that an answer ends on, None if it has none: the first of these that is there:

    the number after "####" that ends its line (GSM8K; the first such line, for a model may go on), the last \\boxed{},
    the first number after the last "answer is" or "answer:" on its line, the last number.
    """
    for marked in GSM8K.findall(text):
        found = numbers(marked)
        if len(found) == 1 and re.fullmatch(r"[^\w]*[\d.,/ \u2212-]+[^\w]*", marked):
            return found[0]
    for pattern, place in ((BOXED, -1), (SAID, 0)):
        for marked in reversed(pattern.findall(text)):
            if found := numbers(marked):
                return found[place]
    found = numbers(text)
    return found[-1] if found else None


def normalised(text: str) -> str:
    """Text by which answers are compared: compatible characters made one, no case, single spaces, none before a
    punctuation mark, no quotation marks around it and no full stop, comma or the like at its end."""
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    text = re.sub(r"\s+([.,;:!?])", r"\1", text)
    before = None
    while text != before:
        before = text
        text = text.rstrip(".,;:!? ")
        for opening, closing in ('""', "''", "“”", "‘’", "``", ("**", "**")):
            if len(text) > len(opening + closing) and text.startswith(opening) and text.endswith(closing):
                text = text[len(opening) : -len(closing)].strip()
    return text


LETTERS = string.ascii_uppercase[:10]
LETTERED_LINE = re.compile(rf"^[ \t]*[-*•]?[ \t]*\(?([{LETTERS}])[.):][ \t]*(\S.*?)[ \t]*$", re.MULTILINE)
LETTERED_INLINE = re.compile(rf"\(([{LETTERS}])\)\s*([^()\n]+?)(?=\s*\([{LETTERS}]\)|[.?!]?\s*$|\n)", re.MULTILINE)
BULLET = re.compile(r"^[ \t]*[-*•][ \t]+(\S.*?)[ \t]*$", re.MULTILINE)
LETTER_SAID = re.compile(
    rf"^[\s*\"'`]*(?:option\s+)?\(?([{LETTERS}])(?:[.):,](?=\s|\*|$)|[\s*\"'`.]*$)", re.IGNORECASE | re.MULTILINE
)
LETTER_INSIDE = re.compile(rf"\(([{LETTERS}])\)|\boption ([{LETTERS}])\b")
TRUTHS = {"yes": "yes", "no": "no", "true": "true", "false": "false"}


def options_of(prompt: str) -> dict[str, str]:
    """The options that a question lists, name -> normalised text; empty if it lists none.

    "A. ...", "(A) ...", "- A: ..." on lines or "(A) ... (B) ..." within one are named by their letters, which must
    run from A; two or more lines with bullets are named by their texts.
    """
    for pattern in (LETTERED_LINE, LETTERED_INLINE):
        found = pattern.findall(prompt)
        # The last run that begins with A: examples in the prompt may list options too.
        starts = [place for place, (letter, _) in enumerate(found) if letter == "A"]
        run = found[starts[-1] :] if starts else []
        if len(run) > 1 and "".join(letter for letter, _ in run) == LETTERS[: len(run)]:
            return {letter: normalised(text) for letter, text in run}
    bullets = [normalised(text) for text in BULLET.findall(prompt)]
    return {text: text for text in bullets if text} if len(bullets) > 1 else {}


def chosen_option(answer: str, options: dict[str, str]) -> str | None:
    """The name of the option that `answer` chooses, None where it chooses none or more than one.

    options: of `options_of`; without any the question is one of yes or no (true or false), and the answer's first
    word counts. Else the first of these that is there: the answer, or what follows its last "answer is", is an
    option's letter or text or begins with its letter; it names one letter, "(B)" or "option B"; it contains the text
    of one option and of no other (longest first: "less energy" does not name "less").
    """
    if not options:
        words = re.findall(r"[a-z]+", answer.casefold())
        return TRUTHS.get(words[0]) if words else None
    for said in [*reversed(SAID.findall(answer)), answer.strip()]:
        if (found := _named(said, options)) is not None:
            return found
    letters = {first or second for first, second in LETTER_INSIDE.findall(answer)} & options.keys()
    if letters:
        return letters.pop() if len(letters) == 1 else None
    rest, mentioned = normalised(answer), []
    for name, text in sorted(options.items(), key=lambda option: -len(option[1])):
        pattern = rf"(?<!\w){re.escape(text)}(?!\w)"
        if text and re.search(pattern, rest):
            mentioned.append(name)
            rest = re.sub(pattern, " ", rest)
    return mentioned[0] if len(mentioned) == 1 else None


def _named(said: str, options: dict[str, str]) -> str | None:
    """The option that `said` is, or begins with the letter of."""
    whole = normalised(said)
    texts = [name for name, text in options.items() if text == whole]
    if len(texts) == 1:
        return texts[0]
    letter = LETTER_SAID.match(said)
    return letter[1].upper() if letter and letter[1].upper() in options else None


FENCE = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
ASSERTION = re.compile(r"^[ \t]*(assert\b.*)$", re.MULTILINE)


def code_of(answer: str) -> str:
    """The Python code in an answer: its first fenced block, else its longest run of lines that parses, from the first
    line that could begin a program. Text without any is given back as it is, and will not run."""
    blocks = [body for language, body in FENCE.findall(answer) if language.lower() in ("", "python", "py", "python3")]
    if blocks:
        return str(blocks[0])
    lines = answer.splitlines()
    starts = [0, *(place for place, line in enumerate(lines) if re.match(r"(def|class|import|from|async|@)\b|@", line))]
    for start in starts:
        for end in range(len(lines), start, -1):
            code = "\n".join(lines[start:end])
            if parses(code):
                return code
    return answer


def parses(code: str) -> bool:
    """Whether `code` is Python, and any at all."""
    try:
        return bool(ast.parse(code).body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def assertions(prompt: str) -> str:
    """The assert lines of a prompt (MBPP's "Your code should pass this test"), those that are Python."""
    return "\n".join(line for line in ASSERTION.findall(prompt) if parses(line))
