"""Verifiable instructions: what a program can check in an answer, such as "no commas" or "at least three bullets".

The checks are those of IFEval (Zhou et al. 2023, arXiv 2311.07911) by their public names, arguments and meanings, the
code our own. Left out are language:response_language and length_constraints:number_sentences, which rest on trained
models of languages. change_case:capital_word_frequency counts words of letters and digits (IFEval: NLTK's tokens),
and change_case:english_capital and english_lowercase look at the case alone, not at the language.
"""

import inspect
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

Relation = Literal["less than", "at least"]
Check = Callable[..., bool]
YES_NO_MAYBE = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


def _holds(count: int, relation: Relation, number: int) -> bool:
    return count < number if relation == "less than" else count >= number


def _existence(answer: str, keywords: list[str]) -> bool:
    return all(re.search(re.escape(keyword), answer, re.IGNORECASE) for keyword in keywords)


def _frequency(answer: str, keyword: str, frequency: int, relation: Relation) -> bool:
    return _holds(len(re.findall(re.escape(keyword), answer, re.IGNORECASE)), relation, frequency)


def _forbidden(answer: str, forbidden_words: list[str]) -> bool:
    return not any(re.search(rf"\b{re.escape(word)}\b", answer, re.IGNORECASE) for word in forbidden_words)


def _letter(answer: str, letter: str, let_frequency: int, let_relation: Relation) -> bool:
    return _holds(Counter(answer.lower())[letter.lower()], let_relation, let_frequency)


def _words(answer: str, num_words: int, relation: Relation) -> bool:
    return _holds(len(re.findall(r"\w+", answer)), relation, num_words)


def _whole_parts(parts: Sequence[str]) -> list[str] | None:
    """The parts, without an empty first and last one; None where another is empty."""
    if any(not part.strip() for part in parts[1:-1]):
        return None
    return [part for part in parts if part.strip()]


def _paragraphs(answer: str, num_paragraphs: int) -> bool:
    parts = _whole_parts(re.split(r"\s?\*\*\*\s?", answer))
    return parts is not None and len(parts) == num_paragraphs


def _first_word(answer: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    paragraphs = answer.split("\n\n")
    filled = sum(bool(paragraph.strip()) for paragraph in paragraphs)
    if not 1 <= nth_paragraph <= filled or not paragraphs[nth_paragraph - 1].strip():
        return False
    word = paragraphs[nth_paragraph - 1].split()[0].lstrip("'").lstrip('"')
    return filled == num_paragraphs and re.split(r"[.,?!'\"]", word)[0].lower() == first_word.lower()


def _placeholders(answer: str, num_placeholders: int) -> bool:
    return len(re.findall(r"\[.*?\]", answer)) >= num_placeholders


def _postscript(answer: str, postscript_marker: str) -> bool:
    known = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    return re.search(known.get(postscript_marker, re.escape(postscript_marker.lower())), answer.lower()) is not None


def _bullets(answer: str, num_bullets: int) -> bool:
    found = re.findall(r"^\s*\*[^\*].*$", answer, re.MULTILINE) + re.findall(r"^\s*-.*$", answer, re.MULTILINE)
    return len(found) == num_bullets


def _constrained(answer: str) -> bool:
    return any(choice in answer for choice in YES_NO_MAYBE)


def _highlights(answer: str, num_highlights: int) -> bool:
    single = re.findall(r"\*[^\n\*]*\*", answer)
    double = re.findall(r"\*\*[^\n\*]*\*\*", answer)
    return sum(bool(found.strip("*").strip()) for found in single + double) >= num_highlights


def _sections(answer: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.findall(rf"\s?{re.escape(section_spliter)}\s?\d+\s?", answer)) >= num_sections


def _json(answer: str) -> bool:
    text = re.sub(r"^```(?:json)?", "", answer.strip(), flags=re.IGNORECASE).removesuffix("```").strip()
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _title(answer: str) -> bool:
    return any(found.lstrip("<").rstrip(">").strip() for found in re.findall(r"<<[^\n]+>>", answer))


def _two_responses(answer: str) -> bool:
    parts = _whole_parts(answer.split("******"))
    return parts is not None and len(parts) == 2 and parts[0].strip() != parts[1].strip()


def _repeat(answer: str, prompt_to_repeat: str) -> bool:
    return answer.strip().lower().startswith(prompt_to_repeat.strip().lower())


def _end(answer: str, end_phrase: str) -> bool:
    return answer.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def _capital_words(answer: str, capital_frequency: int, capital_relation: Relation) -> bool:
    count = sum(word.isupper() for word in re.findall(r"\w+", answer))
    return _holds(count, capital_relation, capital_frequency)


def _quotation(answer: str) -> bool:
    text = answer.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


CHECKS: dict[str, Check] = {
    "keywords:existence": _existence,
    "keywords:frequency": _frequency,
    "keywords:forbidden_words": _forbidden,
    "keywords:letter_frequency": _letter,
    "length_constraints:number_words": _words,
    "length_constraints:number_paragraphs": _paragraphs,
    "length_constraints:nth_paragraph_first_word": _first_word,
    "detectable_content:number_placeholders": _placeholders,
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:constrained_response": _constrained,
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:json_format": _json,
    "detectable_format:title": _title,
    "combination:two_responses": _two_responses,
    "combination:repeat_prompt": _repeat,
    "startend:end_checker": _end,
    "startend:quotation": _quotation,
    "change_case:capital_word_frequency": _capital_words,
    "change_case:english_capital": str.isupper,
    "change_case:english_lowercase": str.islower,
    "punctuation:no_comma": lambda answer: "," not in answer,
}


def read_instructions(value: Any) -> list[tuple[str, dict[str, Any]]]:
    """(id, arguments) of each instruction of a row: a list of {"id", "kwargs"}, or such a list as JSON text.

    Arguments that are null are left out (a table gives every row all columns).
    Raises ValueError, in words, for anything else, an unknown id, and arguments that are missing, unknown or of a
    wrong type.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise ValueError("the instructions are not JSON") from None
    if not isinstance(value, list) or not value or not all(isinstance(entry, Mapping) for entry in value):
        raise ValueError('the instructions must be a list of {"id": ..., "kwargs": {...}}')
    found = []
    for entry in value:
        given = {name: each for name, each in (entry.get("kwargs") or {}).items() if each is not None}
        name = entry.get("id")
        if name not in CHECKS:
            raise ValueError(f"there is no instruction {name!r}; known are {', '.join(CHECKS)}")
        _check_arguments(name, given)
        found.append((name, given))
    return found


def _check_arguments(name: str, given: Mapping[str, Any]) -> None:
    check = CHECKS[name]
    wanted = {} if check in (str.isupper, str.islower) else dict(list(inspect.signature(check).parameters.items())[1:])
    for argument in given.keys() | wanted.keys():
        if argument not in wanted or argument not in given:
            problem = "needs" if argument in wanted else "has no argument"
            raise ValueError(f"the instruction {name} {problem} {argument!r}")
        if not _fits(given[argument], wanted[argument].annotation):
            raise ValueError(f"the instruction {name}: {argument} cannot be {given[argument]!r}")


def _fits(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is list:
        return isinstance(value, list) and bool(value) and all(isinstance(each, str) for each in value)
    return isinstance(value, kind) and not isinstance(value, bool)


def followed(answer: str, instructions: Sequence[tuple[str, Mapping[str, Any]]]) -> list[bool]:
    """Whether `answer` follows each instruction; an empty answer follows none, as in IFEval."""
    if not answer.strip():
        return [False] * len(instructions)
    return [CHECKS[name](answer, **arguments) for name, arguments in instructions]
