from llama_acc.core.visible import visible


def test_what_would_act_on_a_terminal_is_shown_instead() -> None:
    assert visible("a\x1b[31mb\x07\x7f\x9b\u202ec\u2028") == "a␛[31mb␇␡<U+009B><U+202E>c<U+2028>"
    assert visible("plain\n\ttext é 日本 😀👩‍👩‍👧 \u00a0") == "plain\n\ttext é 日本 😀👩‍👩‍👧 \u00a0"
