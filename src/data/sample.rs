//! Records into token samples.
//!
//! Prompt and answer are tokenised jointly, as the model will meet them. The answer begins where
//! the joint tokens first differ from the tokens of the prompt alone, so that generating from
//! [`Sample::prompt_tokens`] and scoring the answer speak of the same positions.

use std::ops::Range;

use super::error::DataError;
use super::record::{Message, Record, Role};
use super::template::{ChatTemplate, Template};

/// Why a tokenizer failed.
pub type TokenizeError = Box<dyn std::error::Error + Send + Sync>;

/// What building samples needs of a vocabulary.
pub trait Tokenize {
    /// Token ids of `text`. `add_special` puts the BOS token first if the model wants one, and
    /// must add nothing at the end; `parse_special` reads control tokens written in the text.
    fn tokenize(
        &self,
        text: &str,
        add_special: bool,
        parse_special: bool,
    ) -> Result<Vec<i32>, TokenizeError>;
    /// The token that closes an answer: end of turn, or end of text where there is no such token.
    fn end_of_answer(&self) -> Option<i32>;
    /// Whether generation stops at `token`.
    fn is_end(&self, token: i32) -> bool {
        self.end_of_answer() == Some(token)
    }
    /// The text of the BOS token, empty if there is none.
    fn bos_piece(&self) -> String;
    /// The text of the EOS token, empty if there is none.
    fn eos_piece(&self) -> String;
}

/// Token ids and the ranges of them whose loss counts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sample {
    /// All tokens, prompt first.
    pub tokens: Vec<i32>,
    /// Token ranges the loss counts, in order, never empty, never at position 0. The last one
    /// ends with the sample and includes the end-of-answer token.
    pub answers: Vec<Range<usize>>,
    /// Whether tokens were cut to fit.
    pub truncated: bool,
}

impl Sample {
    /// Everything before the last answer.
    pub fn prompt_tokens(&self) -> &[i32] {
        let end = self.answers.last().map_or(self.tokens.len(), |a| a.start);
        &self.tokens[..end]
    }

    /// How many tokens the loss counts.
    pub fn n_answer_tokens(&self) -> usize {
        self.answers.iter().map(Range::len).sum()
    }
}

/// The samples of a set and what happened on the way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SampleSet {
    /// In the order of the records.
    pub samples: Vec<Sample>,
    /// How many were cut to fit.
    pub n_truncated: usize,
    /// How many records were left out because one token has nothing to predict.
    pub n_skipped: usize,
}

/// The least `max_tokens` that leaves room for a prompt and an answer.
const MIN_TOKENS: usize = 4;

/// Tokenises records. Over-long samples are cut to `max_tokens`: the prompt from the left (a
/// leading BOS stays) down to half the room, then the answer at its tail.
pub fn build_samples(
    records: &[Record],
    tokenizer: &dyn Tokenize,
    template: &Template,
    max_tokens: usize,
) -> Result<SampleSet, DataError> {
    if max_tokens < MIN_TOKENS {
        return Err(DataError::MaxTokens {
            max_tokens,
            min: MIN_TOKENS,
        });
    }
    let chat = template.compile(&tokenizer.bos_piece(), &tokenizer.eos_piece())?;
    let mut set = SampleSet {
        samples: Vec::with_capacity(records.len()),
        n_truncated: 0,
        n_skipped: 0,
    };
    for (i, record) in records.iter().enumerate() {
        let layout = lay_out(record, chat.as_ref(), i + 1)?;
        let sample = tokenize(&layout, tokenizer)
            .map_err(|source| DataError::Tokenize {
                record: i + 1,
                source,
            })?
            .map(|sample| truncate(sample, max_tokens));
        match sample {
            Some(sample) => {
                set.n_truncated += usize::from(sample.truncated);
                set.samples.push(sample);
            }
            None => set.n_skipped += 1,
        }
    }
    if set.samples.is_empty() {
        return Err(DataError::NoSamples {
            n_records: records.len(),
        });
    }
    Ok(set)
}

/// Tokenise `records`, with a notice for whatever was cut or left out.
///
/// # Errors
/// Records that cannot be tokenised.
pub fn samples(
    tokenizer: &dyn Tokenize,
    template: &Template,
    records: &[Record],
    max_tokens: usize,
    set: &str,
    notices: &mut Vec<String>,
) -> Result<Vec<Sample>, DataError> {
    let SampleSet {
        samples,
        n_truncated,
        n_skipped,
    } = build_samples(records, tokenizer, template, max_tokens)?;
    if n_truncated > 0 {
        notices.push(format!(
            "{n_truncated} of {} {set} samples cut to {max_tokens} tokens",
            samples.len()
        ));
    }
    if n_skipped > 0 {
        notices.push(format!(
            "{n_skipped} {set} records left out: nothing in them to predict"
        ));
    }
    Ok(samples)
}

/// The tokens to generate an answer from, for a conversation that ends with a user turn.
pub fn build_prompt(
    messages: &[Message],
    tokenizer: &dyn Tokenize,
    template: &Template,
) -> Result<Vec<i32>, DataError> {
    let chat = template.compile(&tokenizer.bos_piece(), &tokenizer.eos_piece())?;
    let text = match &chat {
        Some(chat) => chat.render(messages, true, 1)?,
        None if messages.len() == 1 => format!("Question: {}\nAnswer:", messages[0].content.trim()),
        None => labelled_lines(messages).text + "Assistant:",
    };
    let is_chat = chat.is_some();
    tokenizer
        .tokenize(&text, wants_bos(&text, is_chat, tokenizer), is_chat)
        .map_err(|source| DataError::Tokenize { record: 1, source })
}

/// A record as text, before tokenisation.
struct Layout {
    text: String,
    /// Byte ranges of the answers; the last one ends with the text.
    answers: Vec<Range<usize>>,
    /// What the template writes after the last answer, none if it writes nothing.
    close: String,
    /// A rendered chat template, which may hold control tokens.
    is_chat: bool,
    /// Running text has no end of answer.
    has_end: bool,
}

fn lay_out(
    record: &Record,
    chat: Option<&ChatTemplate>,
    number: usize,
) -> Result<Layout, DataError> {
    let plain = |prompt: String, answer: &str| Layout {
        answers: std::iter::once(prompt.len()..prompt.len() + answer.len()).collect(),
        text: prompt + answer,
        close: String::new(),
        is_chat: false,
        has_end: true,
    };
    Ok(match (record, chat) {
        (Record::Text(text), _) => Layout {
            has_end: false,
            ..plain(String::new(), text)
        },
        (_, Some(chat)) => {
            let turns = record.turns().expect("only running text has no turns");
            chat_layout(&turns, chat, number)?
        }
        (Record::Qa { question, answer }, None) => plain(
            format!("Question: {}\nAnswer:", question.trim()),
            &format!(" {}", answer.trim()),
        ),
        (Record::Completion { prompt, completion }, None) => plain(prompt.clone(), completion),
        (Record::Messages(messages), None) => {
            let mut layout = labelled_lines(messages);
            layout.text.pop(); // the newline after the last answer
            layout
        }
    })
}

/// `System:`, `User:` and `Assistant:` lines, each closed by a newline.
fn labelled_lines(messages: &[Message]) -> Layout {
    let mut text = String::new();
    let mut answers = Vec::new();
    for message in messages {
        text.push_str(match message.role {
            Role::System => "System:",
            Role::User => "User:",
            Role::Assistant => "Assistant:",
        });
        let start = text.len();
        text.push(' ');
        text.push_str(message.content.trim());
        if message.role == Role::Assistant {
            answers.push(start..text.len());
        }
        text.push('\n');
    }
    Layout {
        text,
        answers,
        close: String::new(),
        is_chat: false,
        has_end: true,
    }
}

fn chat_layout(turns: &[Message], chat: &ChatTemplate, number: usize) -> Result<Layout, DataError> {
    let last = turns.len() - 1;
    let prompt = chat.render(&turns[..last], true, number)?;
    let whole = chat.render(turns, false, number)?;
    // Templates that rewrite history (stripping thoughts, say) are not prefixes of themselves:
    // then the answer follows the prompt as it is and the vocabulary says how it ends.
    let content = turns[last].content.trim();
    let (answer, close) = match whole
        .strip_prefix(&prompt)
        .and_then(|r| answer_in(r, content))
    {
        Some((len, rest)) => (
            whole[prompt.len()..prompt.len() + len].to_owned(),
            rest.to_owned(),
        ),
        None => (content.to_owned(), String::new()),
    };
    let mut answers = Vec::new();
    for (i, turn) in turns[..last].iter().enumerate() {
        if turn.role != Role::Assistant {
            continue;
        }
        let before = chat.render(&turns[..i], true, number)?;
        let after = prompt.strip_prefix(&before);
        if let Some((len, _)) = after.and_then(|rest| answer_in(rest, turn.content.trim())) {
            answers.push(before.len()..before.len() + len);
        }
    }
    answers.push(prompt.len()..prompt.len() + answer.len());
    Ok(Layout {
        text: prompt + &answer,
        answers,
        close,
        is_chat: true,
        has_end: true,
    })
}

/// If `rest` begins with `content` after white space: the length of both, and what follows.
fn answer_in<'a>(rest: &'a str, content: &str) -> Option<(usize, &'a str)> {
    let follows = rest.trim_start().strip_prefix(content)?;
    Some((rest.len() - follows.len(), follows))
}

/// The template may have written BOS already; a second one would shift everything the model saw.
fn wants_bos(text: &str, is_chat: bool, tokenizer: &dyn Tokenize) -> bool {
    let bos = tokenizer.bos_piece();
    !(is_chat && !bos.is_empty() && text.starts_with(&bos))
}

/// `None` where there are not two tokens.
fn tokenize(layout: &Layout, tokenizer: &dyn Tokenize) -> Result<Option<Sample>, TokenizeError> {
    let Layout { text, is_chat, .. } = layout;
    let bos = wants_bos(text, *is_chat, tokenizer);
    let mut tokens = tokenizer.tokenize(text, bos, *is_chat)?;
    let boundary = |bytes: usize| -> Result<usize, TokenizeError> {
        let alone = tokenizer.tokenize(&text[..bytes], bos, *is_chat)?;
        Ok(common_prefix(&alone, &tokens))
    };
    let mut answers: Vec<Range<usize>> = Vec::with_capacity(layout.answers.len());
    let last = layout.answers.len() - 1;
    for (i, bytes) in layout.answers.iter().enumerate() {
        let start = boundary(bytes.start)?;
        let end = if i == last {
            tokens.len()
        } else {
            let end = boundary(bytes.end)?;
            end + usize::from(tokens.get(end).is_some_and(|&t| tokenizer.is_end(t)))
        };
        answers.push(start..end);
    }
    if layout.has_end {
        let closing = tokenizer.tokenize(layout.close.trim_start(), false, true)?;
        let end = closing.first().copied().filter(|&t| tokenizer.is_end(t));
        if let Some(end) = end.or(tokenizer.end_of_answer()) {
            if !tokens.last().is_some_and(|&t| tokenizer.is_end(t)) {
                tokens.push(end);
            }
            answers[last].end = tokens.len();
        }
    }
    // Nothing comes before position 0 to predict it from.
    for answer in &mut answers {
        answer.start = answer.start.max(1);
    }
    answers.retain(|answer| !answer.is_empty());
    Ok((!answers.is_empty()).then_some(Sample {
        tokens,
        answers,
        truncated: false,
    }))
}

fn common_prefix(a: &[i32], b: &[i32]) -> usize {
    a.iter().zip(b).take_while(|(x, y)| x == y).count()
}

fn truncate(mut sample: Sample, max_tokens: usize) -> Sample {
    let n = sample.tokens.len();
    if n <= max_tokens {
        return sample;
    }
    sample.truncated = true;
    let n_prompt = sample.prompt_tokens().len();
    let n_answer = n - n_prompt;
    let room = max_tokens.saturating_sub(n_answer).max(max_tokens / 2);
    let n_cut = n_prompt.saturating_sub(room);
    if n_cut > 0 {
        // Position 0 stays: it is BOS, or else as good a first token as any other.
        sample.tokens.drain(1..1 + n_cut);
        for answer in &mut sample.answers {
            answer.start = answer.start.saturating_sub(n_cut).max(1);
            answer.end = answer.end.saturating_sub(n_cut).max(1);
        }
    }
    sample.tokens.truncate(max_tokens);
    for answer in &mut sample.answers {
        answer.end = answer.end.min(max_tokens);
    }
    sample.answers.retain(|answer| answer.start < answer.end);
    sample
}

#[cfg(test)]
#[path = "sample_tests.rs"]
mod tests;
