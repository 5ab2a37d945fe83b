"""Phrases by which an answer refuses, and stock phrases of assistants' prose; our own lists, for English.

Both are matched against the words of a text joined by single spaces (`nmjax.metrics.texts.words`: lower case, no outer
punctuation, straight apostrophes), from the beginning of a word to the end of one; punctuation between words is no bar.
"""

_CANNOT = (
    r"(?:i (?:cannot|can not|can't|won't|will not)|i (?:won't|will not) be able to|(?:i am|i'm) (?:unable|not able) to)"
)
_I_AM_NOT = r"(?:i am|i'm) not"
_ANSWER = r"(?:advise|answer|choose|comment|decide|discuss|give|judge|offer|provide|respond|write)"
_AN_AI = r"an? (?:ai|artificial intelligence|(?:ai |large )?language model|(?:ai|virtual) assistant)"

REFUSALS = (
    rf"{_CANNOT} (?:help|assist)(?: you)? with",
    rf"{_CANNOT} (?:help|assist) you",
    rf"{_CANNOT} assist",
    rf"{_CANNOT} comply",
    rf"{_CANNOT} (?:fulfill|fulfil|complete|honor|honour) (?:this|that|your) (?:request|task)",
    rf"{_CANNOT} (?:answer|respond to) (?:this|that|your)",
    rf"{_CANNOT} (?:provide|offer|give)(?: you)?(?: an?| any| with)?(?: \S+)? (?:advice|answers?|guidance|opinions?)",
    rf"{_CANNOT} (?:generate|produce) (?:this|that|such|content|text)",
    rf"{_CANNOT} (?:write|create) (?:content|stories|poems|(?:this|that) (?:kind|sort|type) of)",
    rf"{_CANNOT} (?:engage|participate|take part) in (?:this|that|such)",
    rf"{_CANNOT} discuss (?:this|that|such)",
    rf"{_CANNOT} make (?:this|that|such an?|moral|ethical) (?:decisions?|judge?ments?|choices?)",
    rf"{_CANNOT} (?:take|choose|pick) (?:sides|a side)",
    rf"(?:sorry|afraid)(?: but| that)? {_CANNOT} (?:do (?:this|that|so)|tell you)",
    rf"{_I_AM_NOT} (?:programmed|designed|trained) to",
    rf"{_I_AM_NOT} (?:permitted|allowed) to {_ANSWER}",
    rf"{_I_AM_NOT} comfortable (?:answering|discussing|generating|providing|writing|with (?:this|that|your) request)",
    rf"{_I_AM_NOT} (?:qualified|in a position) to {_ANSWER}",
    rf"as {_AN_AI}(?: \S+)? i (?:cannot|can't|don't|do not|am not|am unable|won't|will not|must)",
    rf"(?:i am|i'm) (?:just|merely|only) {_AN_AI}",
    r"i (?:must|have to|will have to) (?:respectfully |politely )?decline",
    r"i (?:respectfully|politely) decline",
    r"i (?:decline|refuse) to (?:answer|assist|comment|comply|help|respond|write)",
    r"(?:i would|i'd) (?:rather not|prefer not to) (?:answer|comment|respond|say)",
    r"i (?:do not|don't) have (?:personal )?(?:beliefs|opinions)",
    rf"it (?:is not|isn't|would not be|wouldn't be) appropriate for me to {_ANSWER}",
    rf"it (?:is|would be) (?:inappropriate|irresponsible|unethical) (?:for|of) me to {_ANSWER}",
    r"(?:this|that|your) request (?:goes against|violates)",
    r"against my (?:guidelines|policies|policy|programming)",
    r"(?:beyond|outside)(?: of)? my capabilities",
    r"please (?:ask|try) (?:something else|(?:a different|another) (?:question|request))",
)
"""Regular expressions, each a way to say no to the task itself."""

STOCK_PHRASES = (
    "a delicate balance",
    "a myriad of",
    "a plethora of",
    "a rich tapestry",
    "a sense of wonder",
    "a stark reminder",
    "a testament to",
    "a wide range of",
    "as an ai",
    "at the end of the day",
    "complex and multifaceted",
    "delve into",
    "each and every",
    "embark on a journey",
    "ever-changing",
    "ever-evolving",
    "feel free to",
    "first and foremost",
    "game changer",
    "here are some",
    "i hope this helps",
    "in conclusion",
    "in the realm of",
    "in today's fast-paced world",
    "in today's world",
    "it depends on the specific",
    "it is crucial to",
    "it is essential to",
    "it is important to consider",
    "it is important to note",
    "it is important to remember",
    "it is worth noting",
    "it's crucial to",
    "it's essential to",
    "it's important to consider",
    "it's important to note",
    "it's important to remember",
    "it's worth noting",
    "let me know if you",
    "navigate the complexities",
    "needless to say",
    "nestled in",
    "on the other hand",
    "plays a crucial role",
    "serves as a reminder",
    "shed light on",
    "stand the test of time",
    "that being said",
    "there is no one-size-fits-all",
    "this is a complex",
    "to the best of my knowledge",
    "ultimately the decision",
)
"""Literal phrases: cliches, hedges and filler that say little about the prompt at hand."""
