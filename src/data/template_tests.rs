use super::*;
use crate::data::Role;

fn turn(role: Role, content: &str) -> Message {
    Message {
        role,
        content: content.into(),
    }
}

fn render(source: &str, messages: &[Message], open: bool) -> Result<String, DataError> {
    Template::Gguf(source.into())
        .compile_at("<s>", "</s>", 1_721_952_000)?
        .expect("a GGUF template compiles to something")
        .render(messages, open, 7)
}

#[test]
fn blocks_leave_no_blank_lines_and_python_methods_work() {
    let source = "{{ bos_token }}{% for m in messages %}\n    \
                  {% if m['role'].startswith('user') %}\n\
                  Q {{ m.content.strip() | upper }}\n\
                  {% endif %}\n{% endfor %}\n\
                  {% if add_generation_prompt %}\nA:{% endif %}";
    let text = render(source, &[turn(Role::User, " why ")], true).unwrap();
    assert_eq!(text, "<s>Q WHY\nA:");
}

#[test]
fn tojson_is_pythons() {
    let source = "{{ messages | tojson }}|{{ {'k': [1, '<é>']} | tojson(indent=2) }}";
    let text = render(source, &[turn(Role::User, "a'<b>\n")], false).unwrap();
    assert_eq!(
        text,
        "[{\"role\": \"user\", \"content\": \"a'<b>\\n\"}]|{\n  \"k\": [\n    1,\n    \"<é>\"\n  ]\n}"
    );
}

#[test]
fn raised_exceptions_and_bad_syntax_name_the_record_and_the_origin() {
    let error = render("{{ raise_exception('no system role') }}", &[], false).unwrap_err();
    assert!(error.to_string().contains("record 7"), "{error}");
    let DataError::Render { source, .. } = &error else {
        panic!("{error:?}")
    };
    assert!(source.to_string().contains("no system role"));
    let error = render("{% for %}", &[], false).unwrap_err();
    assert!(matches!(error, DataError::Template { .. }));
    assert!(error.to_string().contains("the GGUF"));
}

#[test]
fn dates_are_the_calendars() {
    assert_eq!(
        strftime("%d %b %Y %H:%M %A %q %", 1_721_952_000),
        "26 Jul 2024 00:00 Friday %q %"
    );
    assert_eq!(strftime("%F %a", 951_782_400), "2000-02-29 Tue");
    assert_eq!(strftime("%F", 0), "1970-01-01");
    assert_eq!(strftime("%F", 4_102_444_799), "2099-12-31");
    assert_eq!(
        render("{{ strftime_now('%Y') }}", &[], false).unwrap(),
        "2024"
    );
}

#[test]
fn generation_tags_print_nothing() {
    let source =
        "{% for m in messages %}{% generation %}{{ m.content }}{%- endgeneration -%} ;{% endfor %}";
    let text = render(source, &[turn(Role::Assistant, "a")], false).unwrap();
    assert_eq!(text, "a;");
}

/// The expected text is Jinja2's, made by tests/golden/chat.py.
#[test]
fn constructs_of_real_templates_render_as_in_jinja2() {
    let messages = [
        turn(Role::System, "Be brief. "),
        turn(Role::User, "1?"),
        turn(Role::Assistant, "<think>hm</think>\n\nOne."),
        turn(Role::User, "2 <é> 'q'"),
        turn(Role::Assistant, "Two\n"),
    ];
    let source = include_str!("../../tests/golden/chat.jinja");
    let text = render(source, &messages, true).unwrap();
    assert_eq!(text, include_str!("../../tests/golden/chat.txt"));
    let error = render(source, &messages[2..], true).unwrap_err();
    assert!(matches!(error, DataError::Render { .. }), "{error}");
}
