"""Why a job failed, as something that can be counted: an error message without what is about one case.

What is taken out leaves `#`: quoted texts, URLs, addresses, paths, long hexadecimal and base64 strings, and every
number but an HTTP status after `HTTP`, `status` or `code`. Of a message the first line that is not blank counts.

All classes of characters are spelled in ASCII, and nothing depends on a locale, so that a message has one reason in
every database.
"""

_LETTERS = {letter: f"[{letter.upper()}{letter}]" for letter in "abcdefghijklmnopqrstuvwxyz"}


def _any_case(word: str) -> str:
    return "".join(_LETTERS.get(letter, letter) for letter in word)


_HTTP, _STATUS, _CODE = map(_any_case, ("http", "status", "code"))
_LINKS = "|".join(map(_any_case, ("status", "code", "error", "response", "is", "was")))

_RULES = (
    # The first line, and no control characters in it, so that the mark below is free.
    (r"^[\u0001-\u0020]+", ""),
    (r"(?s)[\r\n].*", ""),
    (r"[\u0001-\u001f][\u0001-\u0020]*| [\u0001-\u0020]+", " "),
    # An HTTP status gets a mark, which saves it from the rule of the digits. Nothing is captured: where much is found,
    # that takes longer than the search.
    (
        rf"(?:^|[^A-Za-z])(?:{_HTTP}(?:/[0-9](?:\.[0-9])?)?|{_STATUS}|{_CODE})(?:[ \"':=_/#.([-]|{_LINKS})*"
        r"(?=[1-5][0-9][0-9](?![0-9A-Za-z]|[.,][0-9]))",
        "\\&\u0001",
    ),
    # Quoted texts, up to the end of the line if nothing closes them. An apostrophe within a word is no quote.
    (
        r"\"(?:[^\"\\]|\\.)*(?:\"|\\?$)|`[^`]*(?:`|$)"
        r"|[\u00ab\u00bb\u201c\u201d\u201e][^\u00ab\u00bb\u201c\u201d\u201e]*(?:[\u00ab\u00bb\u201c\u201d\u201e]|$)"
        r"|\u2018(?:[^\u2019]|\u2019(?=[0-9A-Za-z]))*(?:\u2019(?![0-9A-Za-z])|$)",
        "#",
    ),
    (r"(^|[^'0-9A-Za-z])'(?:[^']|'(?=['0-9A-Za-z]))*(?:'(?!['0-9A-Za-z])|$)", r"\1#"),
    # URLs; e-mail addresses and handles; paths; hosts with a port; hexadecimal groups between colons.
    (r"(?:[A-Za-z][0-9A-Za-z+.-]*://|[Ww][Ww][Ww]\.)[^ ]*", "#"),
    (r"[^ @<>(),;:=]*@[^ @<>(),;:=]+", "#"),
    (r"(^|[ (=:,<[])(?:[A-Za-z]:\\|/)[^ ),;:<>]+", r"\1#"),
    (r"(^|[^0-9A-Za-z._-])[0-9A-Za-z_-]+(?:\.[0-9A-Za-z_-]+)+:[0-9]+(?![0-9A-Za-z])", r"\1#"),
    (r"(^|[^0-9A-Za-z:])[0-9A-Fa-f]{0,4}(?::[0-9A-Fa-f]{0,4}){2,7}(?![0-9A-Za-z:])", r"\1#"),
    # Base64, which is long from its first digit on, or padded; words with a letter after a digit; long hexadecimals.
    (r"(^|[^0-9A-Za-z+/_-])[A-Za-z+/_-]*[0-9][0-9A-Za-z+/_-]{15,}=*", r"\1#"),
    (r"(^|[^0-9A-Za-z+/_-])[0-9A-Za-z+/]{16,}==?(?![0-9A-Za-z+/=_-])", r"\1#"),
    (r"(^|[^0-9A-Za-z])(?:[A-Za-z]*[0-9]+[A-Za-z][0-9A-Za-z]*|[0-9A-Fa-f]{8,}(?![0-9A-Za-z]))", r"\1#"),
    # All other digits but those behind a mark; then the marks, and what has become a list of nothing.
    (r"(^|[^0-9\u0001])[0-9]+", r"\1#"),
    (r"\u0001", ""),
    (r"#(?:[ .,:;/_+-]*#)+", "#"),
)
"""Pattern and replacement, in turn."""


def failure_reason(message: str) -> str:
    """The reason in a message, as SQL, ready for `Statement`: at most 120 characters; null if nothing is left."""
    text = f"left({message}, 1000)"
    for pattern, replacement in _RULES:
        escaped = "'" + pattern.replace("'", "''").replace("{", "{{").replace("}", "}}") + "'"
        put = " || chr(1) || ".join(f"'{part}'" for part in replacement.split("\u0001"))
        text = f"regexp_replace({text}, {escaped}, {put}, 'g')"
    return f"nullif(rtrim(left(btrim({text}), 120)), '')"
