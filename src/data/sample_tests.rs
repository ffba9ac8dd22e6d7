use super::*;

/// Longest-match over a few pieces, single bytes otherwise (id = 1000 + byte). Pieces in angle
/// brackets are control tokens.
struct Toy {
    pieces: Vec<&'static str>,
    bos: Option<&'static str>,
    end: Option<&'static str>,
}

impl Toy {
    fn id(&self, piece: &str) -> i32 {
        self.pieces
            .iter()
            .position(|p| *p == piece)
            .expect("known piece") as i32
    }

    fn text(&self, tokens: &[i32]) -> String {
        let bytes: Vec<u8> = tokens
            .iter()
            .flat_map(|&token| match usize::try_from(token - 1000) {
                Ok(byte) => vec![byte as u8],
                Err(_) => self.pieces[token as usize].as_bytes().to_vec(),
            })
            .collect();
        String::from_utf8(bytes).unwrap()
    }
}

impl Tokenize for Toy {
    fn tokenize(
        &self,
        text: &str,
        add_special: bool,
        parse_special: bool,
    ) -> Result<Vec<i32>, TokenizeError> {
        if text.contains('\0') {
            return Err("a zero byte".into());
        }
        let mut tokens: Vec<i32> = Vec::new();
        if let (true, Some(bos)) = (add_special, self.bos) {
            tokens.push(self.id(bos));
        }
        let mut rest = text;
        while !rest.is_empty() {
            let piece = self
                .pieces
                .iter()
                .filter(|p| rest.starts_with(**p) && (parse_special || !p.starts_with('<')))
                .max_by_key(|p| p.len());
            match piece {
                Some(piece) => {
                    tokens.push(self.id(piece));
                    rest = &rest[piece.len()..];
                }
                None => {
                    let width = rest.chars().next().map_or(1, char::len_utf8);
                    tokens.extend(rest.bytes().take(width).map(|b| 1000 + i32::from(b)));
                    rest = &rest[width..];
                }
            }
        }
        Ok(tokens)
    }
    fn end_of_answer(&self) -> Option<i32> {
        self.end.map(|piece| self.id(piece))
    }
    fn is_end(&self, token: i32) -> bool {
        ["<eos>", "<end>"]
            .iter()
            .any(|p| self.pieces.contains(p) && self.id(p) == token)
    }
    fn bos_piece(&self) -> String {
        self.bos.unwrap_or_default().into()
    }
    fn eos_piece(&self) -> String {
        "<eos>".into()
    }
}

fn toy() -> Toy {
    Toy {
        pieces: vec!["<bos>", "<eos>", "<turn>", "<end>", "Answer", ": Pa"],
        bos: Some("<bos>"),
        end: Some("<eos>"),
    }
}

fn qa(question: &str, answer: &str) -> Record {
    Record::Qa {
        question: question.into(),
        answer: answer.into(),
    }
}

const GEMMA_LIKE: &str = "{{ bos_token }}{% for m in messages %}\
    {{ '<turn>' + m['role'] + '\n' + m['content'] | trim + '<end>\n' }}{% endfor %}\
    {% if add_generation_prompt %}{{ '<turn>assistant\n' }}{% endif %}";

fn one(record: Record, template: &Template, max_tokens: usize) -> Sample {
    let mut set = build_samples(&[record], &toy(), template, max_tokens).unwrap();
    set.samples.remove(0)
}

#[test]
fn plain_pairs_read_question_answer_and_end_with_eos() {
    let toy = toy();
    let sample = one(qa(" Where? ", "Oslo"), &Template::None, 100);
    assert_eq!(
        toy.text(&sample.tokens),
        "<bos>Question: Where?\nAnswer: Oslo<eos>"
    );
    assert_eq!(
        toy.text(sample.prompt_tokens()),
        "<bos>Question: Where?\nAnswer:"
    );
    assert_eq!(sample.n_answer_tokens(), " Oslo".len() + 1);
}

#[test]
fn boundary_stands_where_joint_and_prompt_tokens_part() {
    // ": Pa" swallows the prompt's colon, so the answer has to begin before it.
    let toy = toy();
    let sample = one(qa("Where?", "Paris"), &Template::None, 100);
    assert_eq!(
        toy.text(sample.prompt_tokens()),
        "<bos>Question: Where?\nAnswer"
    );
    assert_eq!(sample.tokens[sample.answers[0].start], toy.id(": Pa"));
}

#[test]
fn chat_template_writes_bos_once_and_its_own_end_token() {
    let toy = toy();
    let template = Template::Gguf(GEMMA_LIKE.into());
    let sample = one(qa("Where?", " Oslo\n"), &template, 100);
    assert_eq!(
        toy.text(&sample.tokens),
        "<bos><turn>user\nWhere?<end>\n<turn>assistant\nOslo<end>"
    );
    assert_eq!(sample.answers.len(), 1);
    assert_eq!(sample.tokens[sample.answers[0].end - 1], toy.id("<end>"));
    assert_eq!(sample.answers[0].end, sample.tokens.len());
    assert_eq!(
        build_prompt(
            &[Message {
                role: Role::User,
                content: "Where?".into()
            }],
            &toy,
            &template
        )
        .unwrap(),
        sample.prompt_tokens()
    );
}

#[test]
fn template_without_bos_gets_the_vocabularys() {
    let toy = toy();
    let template = Template::Gguf(GEMMA_LIKE.replace("{{ bos_token }}", ""));
    let sample = one(qa("Where?", "Oslo"), &template, 100);
    assert!(toy.text(&sample.tokens).starts_with("<bos><turn>user"));
}

#[test]
fn template_that_rewrites_history_falls_back_to_prompt_and_answer() {
    let toy = toy();
    let template = Template::Gguf(
        "{% for m in messages %}{{ m.content | upper }}{% endfor %}\
         {% if add_generation_prompt %}<turn>{% endif %}"
            .into(),
    );
    let sample = one(qa("Where?", "Oslo"), &template, 100);
    assert_eq!(toy.text(&sample.tokens), "<bos>WHERE?<turn>Oslo<eos>");
}

#[test]
fn every_assistant_turn_counts_with_its_end() {
    let toy = toy();
    let turn = |role, content: &str| Message {
        role,
        content: content.into(),
    };
    let record = Record::Messages(vec![
        turn(Role::System, "Be brief."),
        turn(Role::User, "Hi"),
        turn(Role::Assistant, "Hello"),
        turn(Role::User, "Bye"),
        turn(Role::Assistant, "So long"),
    ]);
    let sample = one(record.clone(), &Template::Gguf(GEMMA_LIKE.into()), 200);
    let answers: Vec<String> = sample
        .answers
        .iter()
        .map(|r| toy.text(&sample.tokens[r.clone()]))
        .collect();
    assert_eq!(answers, ["Hello<end>", "So long<end>"]);
    let sample = one(record, &Template::None, 200);
    let answers: Vec<String> = sample
        .answers
        .iter()
        .map(|r| toy.text(&sample.tokens[r.clone()]))
        .collect();
    assert_eq!(answers, [" Hello", " So long<eos>"]);
    assert_eq!(
        toy.text(sample.prompt_tokens()),
        "<bos>System: Be brief.\nUser: Hi\nAssistant: Hello\nUser: Bye\nAssistant:"
    );
}

#[test]
fn text_counts_all_but_the_first_token_and_control_words_stay_text() {
    let sample = one(Record::Text("ab<end>".into()), &Template::None, 100);
    assert_eq!(sample.tokens.len(), 1 + 7);
    assert_eq!(sample.answers, vec![Range { start: 1, end: 8 }]);
    assert_eq!(sample.prompt_tokens().len(), 1);
}

#[test]
fn completion_is_joined_as_it_stands() {
    let toy = toy();
    let record = Record::Completion {
        prompt: "1, 2,".into(),
        completion: " 3".into(),
    };
    let sample = one(record, &Template::None, 100);
    assert_eq!(toy.text(&sample.tokens), "<bos>1, 2, 3<eos>");
    let record = Record::Completion {
        prompt: String::new(),
        completion: "3".into(),
    };
    assert_eq!(
        one(record, &Template::None, 100).answers,
        vec![Range { start: 1, end: 3 }]
    );
}

#[test]
fn long_prompts_lose_their_left_long_answers_their_tail() {
    let toy = toy();
    let sample = one(qa(&"q".repeat(50), "Oslo"), &Template::None, 20);
    assert!(sample.truncated);
    assert_eq!(sample.tokens.len(), 20);
    assert_eq!(
        toy.text(&sample.tokens),
        "<bos>qqqqqqqqqq\nAnswer: Oslo<eos>"
    );
    let sample = one(qa("", &"a".repeat(50)), &Template::None, 24);
    assert_eq!(sample.tokens.len(), 24);
    assert!(toy.text(sample.prompt_tokens()).ends_with("Answer:"));
    assert_eq!(sample.answers.last().unwrap().end, 24);
    // Both too long: half each.
    let sample = one(qa(&"q".repeat(50), &"a".repeat(50)), &Template::None, 30);
    assert_eq!(
        (sample.prompt_tokens().len(), sample.n_answer_tokens()),
        (15, 15)
    );
}

#[test]
fn truncation_is_counted_and_keeps_every_invariant() {
    let turn = |role, content: &str| Message {
        role,
        content: content.into(),
    };
    let record = Record::Messages(vec![
        turn(Role::User, "one"),
        turn(Role::Assistant, "two three four"),
        turn(Role::User, "five"),
        turn(Role::Assistant, "six seven"),
    ]);
    for template in [Template::None, Template::Gguf(GEMMA_LIKE.into())] {
        for max_tokens in MIN_TOKENS..90 {
            let set = build_samples(std::slice::from_ref(&record), &toy(), &template, max_tokens)
                .unwrap();
            let sample = &set.samples[0];
            assert_eq!(set.n_truncated, usize::from(sample.truncated));
            assert!(sample.tokens.len() <= max_tokens);
            assert_eq!(sample.answers.last().unwrap().end, sample.tokens.len());
            let mut end = 1;
            for answer in &sample.answers {
                assert!(answer.start >= end && answer.start < answer.end);
                end = answer.end;
            }
        }
    }
}

#[test]
fn bad_lengths_lone_tokens_and_tokenizer_errors_are_errors() {
    let record = qa("a", "b");
    let records = std::slice::from_ref(&record);
    let error = build_samples(records, &toy(), &Template::None, 3).unwrap_err();
    assert!(matches!(error, DataError::MaxTokens { .. }));
    let bare = Toy {
        bos: None,
        end: None,
        ..toy()
    };
    let error = build_samples(&[Record::Text("x".into())], &bare, &Template::None, 9).unwrap_err();
    assert!(matches!(error, DataError::NoSamples { n_records: 1 }));
    let mixed = [Record::Text("x".into()), Record::Text("xy".into())];
    assert_eq!(
        build_samples(&mixed, &bare, &Template::None, 9)
            .unwrap()
            .n_skipped,
        1
    );
    let bad = [record.clone(), Record::Text("\0".into())];
    let error = build_samples(&bad, &toy(), &Template::None, 9).unwrap_err();
    assert!(matches!(error, DataError::Tokenize { record: 2, .. }));
}
