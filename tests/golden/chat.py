"""Golden value for the test `constructs_of_real_templates_render_as_in_jinja2` in
src/data/template_tests.rs: pip install jinja2. Prints what Jinja2 makes of chat.jinja in the
environment Hugging Face's apply_chat_template sets up."""
import json
import pathlib

from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
env.filters["tojson"] = lambda x, indent=None: json.dumps(x, ensure_ascii=False, indent=indent)
env.globals["strftime_now"] = lambda f: "26 Jul 2024"
source = (pathlib.Path(__file__).parent / "chat.jinja").read_text()
turns = [("system", "Be brief. "), ("user", "1?"), ("assistant", "<think>hm</think>\n\nOne."), ("user", "2 <é> 'q'"), ("assistant", "Two\n")]
messages = [{"role": role, "content": content} for role, content in turns]
text = env.from_string(source).render(messages=messages, add_generation_prompt=True, bos_token="<s>", eos_token="</s>", tools=None, documents=None)
out = pathlib.Path(__file__).parent / "chat.txt"
out.write_text(text)
print(text)
