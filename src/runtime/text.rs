//! Bytes of tokens into text: a character may take several tokens.

/// Take the whole characters off the front of `bytes`; what can never become one is replaced by
/// U+FFFD, what may still become one stays.
pub(crate) fn take_text(bytes: &mut Vec<u8>) -> String {
    let mut text = String::new();
    loop {
        let (valid, bad) = match std::str::from_utf8(bytes) {
            Ok(all) => (all.len(), None),
            Err(e) => (e.valid_up_to(), e.error_len()),
        };
        text.push_str(&String::from_utf8_lossy(&bytes[..valid]));
        bytes.drain(..valid + bad.unwrap_or(0));
        match bad {
            Some(_) => text.push(char::REPLACEMENT_CHARACTER),
            None => return text,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn characters_come_whole() {
        let mut bytes = "a\u{e9}".as_bytes()[..2].to_vec();
        assert_eq!(take_text(&mut bytes), "a");
        bytes.push(0xa9);
        assert_eq!(take_text(&mut bytes), "\u{e9}");
        bytes.extend([b'x', 0xff, b'y', 0xe2, 0x82]);
        assert_eq!(take_text(&mut bytes), "x\u{fffd}y");
        assert_eq!(bytes, [0xe2, 0x82]);
    }
}
