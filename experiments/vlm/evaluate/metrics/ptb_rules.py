"""What a Penn Treebank token looks like: the rules of the tokeniser in ptb_tokens.

The language is that of `PTBTokenizer` of Stanford CoreNLP 3.4.1, which the published caption scorers run,
checked by running it on words, marks and mixtures of them. Rules read the *shape* of a sentence: each letter,
mark, digit and symbol outside ASCII replaced by one that stands for all of its kind.
"""

import re
import unicodedata
from functools import cache
from typing import NamedTuple

LETTER, MARK, DIGIT, SYMBOL, SPACE, UNKNOWN = "é", "\u0301", "\u0660", "§", "\u2003", "\0"

# As hexadecimal ranges: marks that belong to words; characters that are tokens by themselves; spaces.
_MARKS = """237-24F 2C2-379 384-385 3F6 483-487 55A-55F 591-5BD 5BF 5C1-5C2 5C4-5C5 5C7 615-61A 64B-65E 670
6D6-6FE 70F-7B0 7EB-7F3 900-903 93C-94E 951-955 962-963 981-983 9BC-9C4 9C7-9C8 9CB-9CD 9D7 9E2-9E3 A01-A03
A3C A3E-A4F A81-A83 ABC-ACF B82 BBE-BC2 BC6-BC8 BCA-BCD C01-C03 C3E-C56 D3E-D44 D46-D48 E31-E3A E47-E4E
EB1-EBC EC8-ECD 1885-1886"""
_SYMBOLS = """A1 A5-A9 AC AE-B9 BF D7 F7 37E 387 589 5BE 5C0 5C3 5C6 5F3-5F4 600-603 606-60C 614 61B 61E-61F
66A 66D 6D4 700-70D 7F6-7F8 964-965 E3F E4F 1FBD 2016-2017 2020-2023 2030-2038 203B 203E-2042 2044 2070-207E
2080-208E 20A4 2100-214F 2155-215E 2190-2BFF 3002 3012 30FB FF01-FF0F FF1A-FF20 FF3B-FF40 FF5B-FF65 FFE0-FFE1
FFE5-FFE6"""
_SPACES = "2000-200A 3000"
# Characters outside ASCII that a rule names.
_NAMED = (
    "\u0080\u0085\u0091\u0092\u0093\u0094\u0096\u0097\u00a0¢£¤«\u00ad»¼½¾\u058a٫٬‐‑–—―‘’‚‛“”„‟…‹›⁄₠€⅓⅔、"
    "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻₀₁₂₃₄₅₆₇₈₉₊₋"
)

# Words that keep the period behind them: any, titles and the like, and those that do so before a number. A
# letter in brackets is that case alone: "Mass." and not "mass.".
_ABBREVIATIONS = r"""Jan Feb Mar Apr Jun Jul Aug Sept? Oct Nov Dec Mon Tues? Wed Thu Thurs Fri
Ala Ariz [A]z [A]rk Calif Colo Conn Ct Dak [D]el Fla Ga [I]ll Ind Kans? Ky [L]a [M]ass Md Mich Minn
[M]iss Mo Mont
Neb Nev Okla [O]re [P]a Penn Tenn [T]ex Va Vt [W]ash Wisc? Wyo
Inc Cos? Corp Pp?t[ye]s? Ltd Plc Rt Bancorp Bhd Assn Univ Intl Sys
al Bldg Blvd Bros Ed\.D Esq est etc ext Jr Ph\.D Rd seq sq Sr tel"""
_TITLES = r"""Adj Adm Adv Alex Assoc Asst Attys? Ave Brig Capt cf Cie Col Co?mdr Cpl Dept Det Drs? Elec Ens
Ft Gen Govs? Hon Insp Invt Jos Lieut Lt Maj Messrs [M]iss Mlle Mme Mrs? Ms Msgr Mt M[ft]g Natl Pfc Ph Pres
Profs? Pvt Reps? Rev Rt Sens? Sfc Sgt Spc Ste? Supts? TREAS vs [v] Wm"""
_BEFORE_NUMBERS = "art bldg ca figs? nos? op pp prop"
# Words that begin a sentence: "I" before one of them does not keep the period that "J. Smith" keeps.
_OPENERS = r"""About According Additionally After An A As At But Earlier He Her Here However If In It
Last Many More Mr\. Ms\. Now Once One Other Our She Since So Some Such That The Their Then There These They
This We When While What Yet You"""
_FILES = """avi bat bmp bz2 c class cgi cpp dll docx? exe flv gif gz h html? jar java jpe?g mov mp[34g]
pdf php pl png ppt ps py sql tar txt wav wm[va] x xml zip"""


def _any(words: str) -> str:
    return f"(?:{'|'.join(words.split())})"


_J, _D = f"[A-Za-z{LETTER}]", f"[0-9{DIGIT}]"
_JD = f"[A-Za-z0-9{LETTER}{DIGIT}]"
_L = f"(?:[A-Za-z{LETTER}{MARK}\u00ad]|&[aeiouAEIOU](?:acute|grave|uml);)"
_LD = f"(?:[A-Za-z0-9{LETTER}{MARK}{DIGIT}\u00ad]|&[aeiouAEIOU](?:acute|grave|uml);)"
_SP, _SPNL = f"[ \t\u00a0{SPACE}]", f"[ \t\u00a0{SPACE}\n]"
_APOS = "(?:['\u0092’]|&apos;)"
_APOS2 = "(?:['`\u0092’\u0091‘‛]|&apos;)"
_NUM = f"(?:{_D}*(?:[.:,\u00ad٫٬]{_D}+)+|{_D}+)"
_WORD = rf"{_L}{_LD}*(?:[.!?]{_L}{_LD}*)*"
_ACRONYM = r"(?:[A-Za-z](?:\.[A-Za-z])+|(?:Canada|Sino|Korean|EU|Japan|non)-U\.S|U\.S\.-(?:U\.K|U\.S\.S\.R))"
_TITLE = f"(?:{_ACRONYM}|{_any(_TITLES)}|[A-Za-z])"
_PART = f"(?:[dDoOlL]{_APOS2}{_JD})?{_JD}+"
_THING = rf"{_PART}(?:[-_\u058a‐‑]{_PART})*"
_HTHING = rf"[A-Za-z0-9][A-Za-z0-9.,\u00ad]*(?:-(?:{_ACRONYM}\.|[A-Za-z0-9\u00ad]+))+"
_EYE = r"[\-\^x=~<>']"
_AREA = r"(?:\+\+?)?(?:[0-9]{2,4}[- \u00a0])?"
_SIDE = "[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}"
_AFTER = "[,;:、]"
_QUOTES = f"(?:''|[`‘’‚‛“”„‟‹›«»\u0091-\u0094]{{1,2}}|{_APOS})"
_REDAUX = f"{_APOS}(?:[msd]|[MSD]|re|ve|ll)"
_TAG = r"[A-Za-z][A-Za-z0-9_:.\-]*"
_VALUE = r"""(?:'[^'\n]*'|"[^"\n]*")"""
_SGML = rf"<(?:[!?][A-Za-z\-][^>\n]*|{_TAG}(?: +{_TAG}(?: *= *{_VALUE})?)* */?|/{_TAG}) *>"
_STOP = r""" \t\n\f\r"<>|()"""  # ends an address
_STOP2 = rf"""{_STOP}{{}}.!?,"""
_SITE = rf"(?:www\.(?:[^{_STOP2}]+\.)+[a-zA-Z]{{2,4}}|(?:[^{_STOP2}`'$,-_]+\.)+(?:com|net|org|edu))"
_PATH = rf"/[^{_STOP}]+[^{_STOP2}\-]"
_OPENER = _any(re.sub("([A-Z])", r"[\1]", _OPENERS))
_OPENING = f"{_SPNL}+(?:{_OPENER}|{_SGML}){_SPNL}"

# (pattern, change). The first of rules that see equally long text counts. A plain group is the token.
_TABLE = [
    (r"[c][+][+]|[C][+][+]|[cfCF]\#", ""),
    (r"(can)not|('t)was", ""),
    (r"('t)is|(gon|wan)na|(got)ta|(lem|gim)me", ""),
    (_SGML, "one token"),
    (r"&(?:MD|mdash|ndash);|[\u0096\u0097–—―]", "dash"),
    (r"&amp;", "ampersand"),
    (r"&(?:HT|TL|UR|LR|QC|QL|QR|odq|cdq|\#[0-9]+);", ""),
    (rf"({_WORD}){_REDAUX}", "soft hyphen"),
    (rf"([A-Za-z\u00ad]*[A-MO-Za-mo-z]\u00ad*)n{_APOS2}t", "soft hyphen"),
    (_WORD, "soft hyphen"),
    (rf"{_APOS}n{_APOS}?|{_APOS}(?:em|[2-9]0s|till?|cause)|(?:[lLdDjJ]|Dunkin|somethin|ol){_APOS}", ""),
    (rf"[A-HJ-XZn]{_APOS2}{_J}{{2,}}|{_J}+[aeiouyAEIOUY]{_APOS2}[aeiouA-Z]{_J}*", ""),
    (rf"cont'd\.?|nor'easter|c'mon|e'er|s'mores|ev'ry|li'l|nat'l|O{_APOS2}o", ""),
    (rf"(y{_APOS}){_J}", ""),
    (rf"https?://[^{_STOP}{{}}]+[^{_STOP2}\-]", ""),
    (_SITE, ""),
    (_SITE + _PATH, ""),
    (
        rf"(?:&lt;|<)?[a-zA-Z0-9][^{_STOP}{{}}\u00a0]*@(?:[^{_STOP}{{}}\u00a0.]+\.)*[^{_STOP}{{}}\u00a0.]+(?:&gt;|>)?",
        "",
    ),
    (rf"@[a-zA-Z_][a-zA-Z_0-9]*|\#{_L}+", ""),
    (rf"({_REDAUX})[^A-Za-z]", "quotes"),
    (rf"(n{_APOS2}t)[^A-Za-z]", "quotes"),
    (rf"{_D}{{1,2}}[\-/]{_D}{{1,2}}[\-/]{_D}{{2,4}}", ""),
    (rf"[\-+]?{_NUM}", "soft hyphen"),
    ("[⁺⁻₊₋]?(?:[⁰¹²³⁴-⁹]+|[₀-₉]+)", ""),
    (rf"(?:{_D}{{1,4}}[- \u00a0])?{_D}{{1,4}}(?:\\?/|⁄){_D}{{1,4}}", "one token"),
    ("[¼½¾⅓⅔]", "fraction"),
    (rf"-[LR][RCS]B-|C\.D\.s|pro-|anti-|S(?:&|&amp;)(?:P-500|Ls)|Cap{_APOS}n|c{_APOS}est", "ampersand"),
    (rf"{_SIDE}(?:\\?/{_SIDE}){{1,2}}", ""),
    (r"[A-Z]*\$|\#", ""),
    ("[¢£¤\u0080₠€]", "currency"),
    (rf"([A-Za-z])\.{_OPENING}", ""),
    (rf"({_ACRONYM}\.){_OPENING}", ""),
    (rf"({_any(_BEFORE_NUMBERS)}\.){_SPNL}?[0-9]", ""),
    (rf"({_any(_ABBREVIATIONS)}\.)(?:.|\n){{2}}", ""),
    (rf"({_any(_ABBREVIATIONS)})\.", "period again"),  # at the end of all text
    (rf"{_TITLE}\.", ""),
    (rf"({_TITLE}){_SP}", ""),
    (rf"({_ACRONYM}){_SPNL}", ""),
    (rf"({_APOS}[0-9][0-9]){_SPNL}", ""),
    (rf"({_LD}+(?:\.{_LD}+)*\.{_any(_FILES)})(?:{_SPNL}|[.?!,])", ""),
    (rf"({_WORD}\.){_AFTER}", "soft hyphen"),
    (
        rf"(?:\([0-9]{{2,3}}\)[ \u00a0]?|{_AREA}[0-9]{{2,4}}[- \u00a0])[0-9]{{3,4}}[- \u00a0]?[0-9]{{3,5}}",
        "phone",
    ),
    (r"(?:(?:\+\+?)?[0-9]{2,4}\.)?[0-9]{2,4}\.[0-9]{3,4}\.[0-9]{3,5}", ""),
    (r"\"|&quot;", "quotes"),
    (r"<|&lt;|>|&gt;", "angle"),
    (r"([<>]?[:;=][\-o\*']?[()DPdpO\\{@|\[\]])[^A-Za-z0-9]", "round"),
    (rf"{_EYE}_{_EYE}|\({_EYE}[_.]?{_EYE}\)|\([\^x=~<>']-[\^x=~<>'`]\)", "round"),
    (r"[{}\[\]()]", "bracket"),
    (r"-+", "dashes"),
    (r"\.{3,5}|(?:\.[ \u00a0]){2,4}\.|[\u0085…]", "ellipsis"),
    (r"@+|\#+|_+|\*+|(?:\\\*){1,3}|[?!]+|[.=/,;:、]", ""),
    (rf"({_HTHING}\.){_AFTER}", "soft hyphen"),
    (_HTHING, "soft hyphen"),
    (rf"({_THING}\.){_AFTER}", ""),
    (_THING, ""),
    (rf"([A-Z]+(?:(?:[+&]|&amp;)[A-Z]+)+\.){_AFTER}", "ampersand"),
    (r"[A-Z]+(?:(?:[+&]|&amp;)[A-Z]+)+", "ampersand"),
    (r"(')[A-Za-z][^ \t\n\r\u00a0]", "quotes"),
    (rf"{_REDAUX}|n{_APOS2}t", "quotes"),
    (_QUOTES, "quotes"),
    (r"<<|>>", ""),
    (rf"[+%&~\^|\\{SYMBOL}⁺⁻₊₋⁄]", ""),
    (r"\n", "line"),
    (rf"{_SP}+|&nbsp;", "skip"),
]


class Rule(NamedTuple):
    """One kind of token."""

    pattern: re.Pattern[str]  # what must be seen; the token is its group where it has one, else all of it
    change: str  # what becomes of the token: a key of ptb_tokens.CHANGES, or nothing


def _caseless(pattern: str) -> str:
    """`pattern` with letters matching either case, but for those in brackets or escaped."""
    pieces = re.findall(r"\[(?:\\.|[^\]\\])+\]|\\u....|\\.|.", pattern, re.DOTALL)
    return "".join(f"[{p.lower()}{p.upper()}]" if p.isascii() and p.isalpha() else p for p in pieces)


@cache
def rules() -> list[Rule]:
    """The table, compiled where it is first needed: that takes a while."""
    return [Rule(re.compile(_caseless(pattern)), change) for pattern, change in _TABLE]


class _Shape(dict[int, str]):
    """For str.translate: the character that stands for this one's kind."""

    def __init__(self) -> None:
        ascii_and_named = [*map(chr, range(1, 127)), *_NAMED]
        super().__init__({ord(character): character for character in ascii_and_named})
        for kind, text in ((SPACE, _SPACES), (SYMBOL, _SYMBOLS), (MARK, _MARKS)):
            for first, last in ((word.split("-") * 2)[:2] for word in text.split()):
                for code in range(int(first, 16), int(last, 16) + 1):
                    self.setdefault(code, _letter_or_digit(code) or kind)

    def __missing__(self, code: int) -> str:
        self[code] = _letter_or_digit(code) or UNKNOWN
        return self[code]


def _letter_or_digit(code: int) -> str:
    category = unicodedata.category(chr(code)) if code < 0x10000 else ""  # it reads halves of what is above
    return LETTER if category.startswith("L") else DIGIT if category == "Nd" else ""


SHAPE = _Shape()
