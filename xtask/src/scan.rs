//! Blanks out comments and literals in Rust source, so that `tidy` can search code only.

/// The source with every character of a comment, string or character literal replaced by a space. Line breaks stay, so
/// that line numbers do too.
pub(crate) fn code_only(source: &str) -> String {
    let mut scanner = Scanner { rest: source, code: String::with_capacity(source.len()) };
    let mut previous = ' ';
    while let Some(next) = scanner.rest.chars().next() {
        let in_word = previous.is_alphanumeric() || previous == '_';
        if scanner.rest.starts_with("//") {
            let end = scanner.rest.find('\n').unwrap_or(scanner.rest.len());
            scanner.blank(end);
        } else if scanner.rest.starts_with("/*") {
            scanner.blank(block_comment(scanner.rest));
        } else if next == '"' {
            scanner.blank(string(scanner.rest));
        } else if let Some(length) = raw_string(scanner.rest).filter(|_| !in_word) {
            scanner.blank(length);
        } else if let Some(length) = character(scanner.rest) {
            scanner.blank(length);
        } else {
            scanner.keep(next);
        }
        previous = next;
    }
    scanner.code
}

struct Scanner<'a> {
    rest: &'a str,
    code: String,
}

impl Scanner<'_> {
    fn keep(&mut self, next: char) {
        self.code.push(next);
        self.rest = self.rest.get(next.len_utf8()..).unwrap_or_default();
    }

    fn blank(&mut self, length: usize) {
        let (text, rest) = self.rest.split_at_checked(length).unwrap_or((self.rest, ""));
        self.code.extend(text.chars().map(|c| if c == '\n' { '\n' } else { ' ' }));
        self.rest = rest;
    }
}

/// The length of a block comment, which may contain others.
fn block_comment(text: &str) -> usize {
    let mut depth = 0;
    let mut at = 0;
    while let Some(rest) = text.get(at..).filter(|rest| !rest.is_empty()) {
        if rest.starts_with("/*") {
            (depth, at) = (depth + 1, at + 2);
        } else if rest.starts_with("*/") {
            (depth, at) = (depth - 1, at + 2);
            if depth == 0 {
                return at;
            }
        } else {
            at += rest.chars().next().map_or(1, char::len_utf8);
        }
    }
    text.len()
}

/// The length of a string literal that starts with its quote.
fn string(text: &str) -> usize {
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '"' => return at + 1,
            _ => {}
        }
    }
    text.len()
}

/// The length of a raw string literal such as `r#"..."#`, with its prefix.
fn raw_string(text: &str) -> Option<usize> {
    let prefix = ["r", "br", "cr"].into_iter().find(|prefix| {
        let after = text.strip_prefix(prefix).map(|after| after.trim_start_matches('#'));
        after.is_some_and(|after| after.starts_with('"'))
    })?;
    let after = text.strip_prefix(prefix)?;
    let hashes = after.len() - after.trim_start_matches('#').len();
    let start = prefix.len() + hashes + 1;
    let end = format!("\"{}", "#".repeat(hashes));
    let length = text.get(start..)?.find(&end).map_or(text.len(), |at| start + at + end.len());
    Some(length)
}

/// The length of a character literal; `None` for a lifetime.
fn character(text: &str) -> Option<usize> {
    let mut chars = text.strip_prefix('\'')?.char_indices();
    match chars.next()?.1 {
        '\\' => {
            chars.next()?;
            let end = chars.find(|(_, c)| *c == '\'')?.0;
            Some(end + 2)
        }
        _ => chars.next().filter(|(_, c)| *c == '\'').map(|(at, _)| at + 2),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(source: &str) -> Vec<String> {
        code_only(source).split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn comments_are_blanked() {
        assert_eq!(words("a // b\nc /* d /* e */ f */ g //"), ["a", "c", "g"]);
    }

    #[test]
    fn literals_are_blanked() {
        assert_eq!(words(r#"a "b \" // c" d 'e' f"#), ["a", "d", "f"]);
        assert_eq!(words("a r#\"b \" c\"# d br\"\\\" e"), ["a", "d", "e"]);
    }

    #[test]
    fn quotes_in_character_literals_do_not_open_a_string() {
        assert_eq!(words(r#"a '"' b '\'' c '\\' d '\u{41}' e '"' f"#), ["a", "b", "c", "d", "e", "f"]);
    }

    #[test]
    fn lifetimes_are_kept() {
        assert_eq!(
            words("fn f<'a>(x: &'a str) 'label: loop"),
            ["fn", "f<'a>(x:", "&'a", "str)", "'label:", "loop"]
        );
    }

    #[test]
    fn lines_keep_their_numbers() {
        let source = "a\n/* b\nc */\n\"d\ne\"\nf\n";
        assert_eq!(code_only(source).lines().count(), source.lines().count());
        assert_eq!(code_only(source).lines().nth(5), Some("f"));
    }

    #[test]
    fn characters_of_more_than_one_byte_are_harmless() {
        assert_eq!(words("a /* ä */ 'ö' \"ü\" b"), ["a", "b"]);
    }
}
