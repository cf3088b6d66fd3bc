//! Text that others wrote, made fit to be shown.

/// How much of a record's key is shown.
pub(crate) const LONGEST_NAME: usize = 64;
/// How much is shown of a reason, which may quote a record's value.
pub(crate) const LONGEST_REASON: usize = 200;

/// The first `longest` characters of a text. Whoever may write records may write what they like: no control characters
/// reach a terminal.
pub(crate) fn printable(text: &str, longest: usize) -> String {
    let mut shown = String::new();
    for character in text.chars().take(longest) {
        match character {
            '"' | '\'' | '\\' => shown.push(character),
            _ => shown.extend(character.escape_debug()),
        }
    }
    if text.chars().nth(longest).is_some() {
        shown.push_str("...");
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_shown_is_short_and_harmless() {
        assert_eq!(printable("10.5.34.0-24", LONGEST_NAME), "10.5.34.0-24");
        assert_eq!(printable("\u{1b}[31m\n\"it's\" \\", 64), "\\u{1b}[31m\\n\"it's\" \\");
        assert_eq!(printable("abcd", 3), "abc...");
    }
}
