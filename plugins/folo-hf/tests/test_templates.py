"""Chat templates render as transformers renders them, and cannot escape, run on, or swell."""

from __future__ import annotations

import threading

import pytest
from tiny_models import save_tokenizer

from folo_core.errors import RequestError
from folo_hf.templates import TemplateRenderer
from folo_hf.tokenizer import load_tokenizer

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = [
    CHATML,
    "{{ bos_token }}{% for m in messages %}\n  {% if loop.first %}1{% endif %}\n{{ m.content | trim }}{% endfor %}",
    "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ m | tojson }}{% endfor %}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}!",
    "{{ tools | tojson(indent=2) }}{{ messages[-1].content.split(' ') | join('_') }}{{ thinking | default('no') }}",
    "{%- macro say(m) -%}[{{ m.content }}]{%- endmacro -%}{% for m in messages %}{{ say(m) }}{% endfor %}",
]
DOUBLING = "{% set ns = namespace(x='a') %}{% for i in range(40) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"
CHAT = [{"role": "system", "content": "be <b>kind</b>"}, {"role": "user", "content": " héllo \n w1 "}]


@pytest.fixture(scope="module")
def renderer():
    return TemplateRenderer(seconds=1.0, max_chars=10_000)


@pytest.fixture
def tokenizer(tmp_path):
    save_tokenizer(tmp_path, bos_token="<s>", eos_token="</s>")  # noqa: S106
    return load_tokenizer(tmp_path)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("prompt", [True, False])
def test_equals_transformers(tokenizer, template, prompt):
    options = {"chat_template": template, "add_generation_prompt": prompt, "tools": [{"name": "ü"}]}
    wanted = tokenizer.wrapped.apply_chat_template(CHAT, tokenize=False, **options)
    assert tokenizer.apply_chat_template(CHAT, tokenize=False, **options) == wanted
    assert wanted


def test_token_ids_have_no_added_tokens(tokenizer):
    chat = [{"role": "user", "content": "w1 w2"}]
    assert tokenizer.apply_chat_template(chat, chat_template="{{ messages[0].content }}") == [1, 2]


def test_a_template_may_be_a_file(tokenizer, tmp_path):
    path = tmp_path / "chat.jinja"
    path.write_text("{{ messages[0].content }}!")
    assert tokenizer.apply_chat_template(CHAT, tokenize=False, chat_template=str(path)) == "be <b>kind</b>!"


def test_absent_keys_are_not_printed_as_none(tokenizer):
    chat = [{"role": "assistant", "content": "w1", "tool_calls": None}]
    assert tokenizer.apply_chat_template(chat, tokenize=False, chat_template="{{ messages[0] | tojson }}") == (
        '{"role": "assistant", "content": "w1"}'
    )


def test_no_messages(tokenizer):
    with pytest.raises(RequestError, match="messages: empty"):
        tokenizer.apply_chat_template([], chat_template=CHATML)


def test_no_json(tokenizer):
    with pytest.raises(RequestError, match="not plain JSON"):
        tokenizer.apply_chat_template([{"role": "user", "content": object()}], chat_template=CHATML)


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for %}", "TemplateSyntaxError"),
        ("{{ nothing.at.all }}", "UndefinedError"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ cycler.__init__.__globals__.os.getcwd() }}", "SecurityError"),
        ("{% for i in range(10**9) %}{% endfor %}", "OverflowError"),
        ("{% for i in range(3000) %}xxxxxxxxxx{% endfor %}", "longer than 10000 characters"),
        ("{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}", "more than 1 s"),
        ("{% set x = 'a' * 10**9 %}{% set y = x ~ x ~ x ~ x %}", "MiB|ended the process|more than 1 s"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recurses too deeply"),
    ],
)
def test_what_a_template_cannot_do(renderer, template, why):
    with pytest.raises(RequestError, match=f"(?s)chat_template: .*({why})"):
        renderer.render(template, {"messages": CHAT})
    # The next chat is served, by a new process if need be.
    assert renderer.render("{{ messages[0].role }}", {"messages": CHAT}) == "system"


def test_memory_is_bounded():
    with pytest.raises(RequestError, match=r"more than 512 MiB|ended the process"):
        TemplateRenderer(seconds=30.0).render(DOUBLING, {})


def test_one_process_serves_many_threads(renderer):
    results = {}

    def work(number):
        results[number] = [renderer.render("{{ n }}-{{ i }}", {"n": number, "i": i}) for i in range(20)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {number: [f"{number}-{i}" for i in range(20)] for number in range(4)}


def test_the_process_ends_with_its_renderer():
    renderer = TemplateRenderer()
    assert renderer.render("x", {}) == "x"
    process = renderer._worker._process
    assert process.poll() is None
    del renderer
    assert process.wait(timeout=10) != 0
