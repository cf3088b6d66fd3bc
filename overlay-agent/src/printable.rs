//! Escapes untrusted text for the terminal and the log.

/// Limit for the key of a record, in characters.
pub(crate) const LONGEST_NAME: usize = 64;
/// Limit for a reason, which may quote the value of a record.
pub(crate) const LONGEST_REASON: usize = 200;

/// The first `longest` characters of a text, with control characters escaped.
pub(crate) fn printable(text: &str, longest: usize) -> String {
    let escaped = |character: char| match character {
        '"' | '\'' | '\\' => character.to_string(),
        _ => character.escape_debug().to_string(),
    };
    let mut shown: String = text.chars().take(longest).map(escaped).collect();
    if text.chars().nth(longest).is_some() {
        shown.push_str("...");
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_truncated_and_escaped() {
        assert_eq!(printable("10.5.34.0-24", LONGEST_NAME), "10.5.34.0-24");
        assert_eq!(printable("\u{1b}[31m\n\"it's\" \\", 64), "\\u{1b}[31m\\n\"it's\" \\");
        assert_eq!(printable("abcd", 3), "abc...");
    }
}
