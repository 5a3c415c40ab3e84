"""Answers of people and models made comparable, and VQA's accuracy on them.

The rules are those of the VQA challenge's evaluation page (visualqa.org), in our own words and code. The organisers'
script has a few surprises beyond them that are left out: it joins the words around a sign that stands beside a space
elsewhere in the answer ("t-shirt - red" to "tshirt red"), and around every sign if a comma stands between digits.
It also rewrites people's answers less than the model's (only their punctuation, and that not if all agree), so that it
gives nothing for "none" where all ten said "none". Here both are rewritten alike, which can only give more; what the
server says of the file of `launch/predict.py --format vqa` is what can be compared with published numbers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

PEOPLE_FOR_CERTAIN = 3  # an answer that three others gave counts in full
ARTICLES = {"a", "an", "the"}
_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {"none": "0", **{word: str(number) for number, word in enumerate(_WORDS)}}
# What stands before each ending that is often written without its apostrophe. Words that mean something else without
# it ("its", "were", "well", "shell", "id") are not here.
_ENDINGS = {
    "'t": "ain aren can couldn didn doesn don hadn hasn haven isn mightn mustn needn shan shouldn wasn weren won "
    "wouldn",
    "'s": "he here how she somebody someone something that there what when where who why",
    "'ve": "could i might must should they we what who would you",
    "'re": "there they what who you",
    "'ll": "it somebody someone that they what who you",
    "'d": "he how it somebody someone that there they what where who you",
    "'m": "i",
    "'am": "ma",
    "'clock": "o",
    "'all": "y",
}
CONTRACTIONS = {
    stem + ending.replace("'", ""): stem + ending for ending, stems in _ENDINGS.items() for stem in stems.split()
}
del CONTRACTIONS["whore"]
_SIGNS = re.compile(r'[;/\[\]"{}()=+\\_\-<>@`,?!]')  # not ' and :, which are part of words and times


def normalise_answer(text: str) -> str:
    """An answer as VQA compares it: "The two  dogs, dont!" becomes "2 dogs don't".

    Lower case; commas between digits and full stops that are not decimal points go; other signs become spaces; articles
    go; number words up to ten become digits; contractions get their apostrophe.
    """
    text = re.sub(r"(?<=\d),(?=\d)", "", text.lower())
    text = re.sub(r"\.(?!\d)", "", text)
    words = [NUMBERS.get(word, word) for word in _SIGNS.sub(" ", text).split() if word not in ARTICLES]
    return " ".join(CONTRACTIONS.get(word, word) for word in words)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """VQA's accuracy: min(matches / 3, 1), averaged over the sets that leave out one of the `answers` at a time.

    With ten answers, 1, 2 and 3 matches give 0.3, 0.6 and 0.9, and four or more give 1.
    """
    found = normalise_answer(prediction)
    matches = [normalise_answer(answer) == found for answer in answers]
    total = sum(matches)
    return sum(min((total - own) / PEOPLE_FOR_CERTAIN, 1.0) for own in matches) / len(matches)
