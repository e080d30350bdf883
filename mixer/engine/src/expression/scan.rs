//! Characters to tokens, as Go's scanner makes them.

use super::CompileError;

/// A token; operators carry their own text.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Token {
    Ident(String),
    Int(String),
    Float(String),
    /// As written, and what it means.
    Str(String, String),
    Op(&'static str),
    End,
}

/// A token and the byte it starts at.
#[derive(Clone, Debug)]
pub(super) struct Spanned {
    pub(super) token: Token,
    pub(super) at: usize,
}

impl Token {
    /// How an error message names the token.
    pub(super) fn describe(&self) -> String {
        match self {
            Token::Ident(text) if is_keyword(text) => format!("'{text}'"),
            Token::Ident(text) | Token::Int(text) | Token::Float(text) | Token::Str(text, _) => {
                text.clone()
            }
            Token::Op(text) => format!("'{text}'"),
            Token::End => "'EOF'".to_owned(),
        }
    }
}

/// Words Go keeps for itself; no attribute can be named so.
pub(super) fn is_keyword(word: &str) -> bool {
    matches!(
        word,
        "break"
            | "case"
            | "chan"
            | "const"
            | "continue"
            | "default"
            | "defer"
            | "else"
            | "fallthrough"
            | "for"
            | "func"
            | "go"
            | "goto"
            | "if"
            | "import"
            | "interface"
            | "map"
            | "package"
            | "range"
            | "return"
            | "select"
            | "struct"
            | "switch"
            | "type"
            | "var"
    )
}

/// Longest first, so that the first that fits is the token.
const OPERATORS: [&str; 50] = [
    "<<=", ">>=", "&^=", "...", "&&", "||", "==", "!=", "<=", ">=", "<<", ">>", "&^", "<-", "++",
    "--", "+=", "-=", "*=", "/=", "%=", "&=", "|=", "^=", ":=", "+", "-", "*", "/", "%", "&", "|",
    "^", "<", ">", "=", "!", "(", ")", "[", "]", "{", "}", ",", ";", ".", ":", "//", "/*", "~",
];

/// Splits text into tokens; the last one is [`Token::End`]. With `outputs`, `$out` is another spelling of
/// `output`.
pub(super) fn scan(text: &str, outputs: bool) -> Result<Vec<Spanned>, CompileError> {
    let mut tokens = Vec::new();
    let mut at = 0;
    loop {
        let rest = text.get(at..).unwrap_or_default();
        let Some(first) = rest.chars().next() else {
            tokens.push(Spanned {
                token: Token::End,
                at,
            });
            return Ok(tokens);
        };
        let fail = |at: usize, reason: &str| Err(CompileError::syntax(text, at, reason));
        let (token, length) = match first {
            ' ' | '\t' | '\r' | '\n' => {
                at += 1;
                continue;
            }
            '$' if outputs && rest.starts_with("$out.") => {
                (Token::Ident("output".into()), "$out".len())
            }
            c if c == '_' || c.is_alphabetic() => {
                let end = rest
                    .find(|c: char| c != '_' && !c.is_alphanumeric())
                    .unwrap_or(rest.len());
                (
                    Token::Ident(rest.get(..end).unwrap_or_default().to_owned()),
                    end,
                )
            }
            c if c.is_ascii_digit()
                || (c == '.' && rest.as_bytes().get(1).is_some_and(u8::is_ascii_digit)) =>
            {
                number(rest)
            }
            '"' => {
                let length = match quoted_end(rest, '"') {
                    Some(length) => length,
                    None => return fail(at, "string literal not terminated"),
                };
                let literal = rest.get(..length).unwrap_or_default();
                let inside = literal.get(1..length - 1).unwrap_or_default();
                match unquote(inside, '"') {
                    Some(meaning) => (Token::Str(literal.to_owned(), meaning), length),
                    None => return fail(at, "unknown or invalid escape sequence"),
                }
            }
            '`' => {
                let length = match rest.get(1..).and_then(|r| r.find('`')) {
                    Some(end) => end + 2,
                    None => return fail(at, "raw string literal not terminated"),
                };
                let literal = rest.get(..length).unwrap_or_default();
                let inside = literal.get(1..length - 1).unwrap_or_default();
                (
                    Token::Str(literal.to_owned(), inside.replace('\r', "")),
                    length,
                )
            }
            '\'' => {
                let length = match quoted_end(rest, '\'') {
                    Some(length) => length,
                    None => return fail(at, "rune literal not terminated"),
                };
                let literal = rest.get(..length).unwrap_or_default();
                let inside = literal.get(1..length - 1).unwrap_or_default();
                match unquote(inside, '\'') {
                    Some(meaning) if meaning.chars().count() == 1 => {
                        (Token::Str(literal.to_owned(), meaning), length)
                    }
                    Some(_) => {
                        return fail(at, "illegal rune literal; write strings in double quotes");
                    }
                    None => return fail(at, "unknown or invalid escape sequence"),
                }
            }
            _ if rest.starts_with("//") || rest.starts_with("/*") => {
                return Err(CompileError::new(at, "unexpected expression: a comment"));
            }
            c => match OPERATORS.iter().find(|op| rest.starts_with(**op)) {
                Some(op) if *op != "~" => (Token::Op(op), op.len()),
                _ => {
                    let shown = format!("illegal character U+{:04X} '{c}'", u32::from(c));
                    return fail(at, &shown);
                }
            },
        };
        tokens.push(Spanned { token, at });
        at += length.max(1);
    }
}

/// Digits, fraction, exponent; a letter glued on (`0x1F`, `1_000`, `1i`) stays part of the literal, which
/// then fails to convert.
fn number(rest: &str) -> (Token, usize) {
    let mut end = 0;
    let mut float = false;
    let mut before = ' ';
    for c in rest.chars() {
        let exponent_sign = matches!(c, '+' | '-')
            && matches!(before, 'e' | 'E')
            && !rest.starts_with("0x")
            && !rest.starts_with("0X");
        if !(c == '.' && !float || c == '_' || c.is_ascii_alphanumeric() || exponent_sign) {
            break;
        }
        let hex = rest.starts_with("0x") || rest.starts_with("0X");
        float |= c == '.' || (matches!(c, 'e' | 'E') && !hex);
        end += c.len_utf8();
        before = c;
    }
    let literal = rest.get(..end).unwrap_or_default().to_owned();
    (
        if float {
            Token::Float(literal)
        } else {
            Token::Int(literal)
        },
        end,
    )
}

/// Length of a literal from its opening quote through its closing one, on one line.
fn quoted_end(rest: &str, quote: char) -> Option<usize> {
    let mut escaped = false;
    for (at, c) in rest.char_indices().skip(1) {
        match c {
            '\n' => return None,
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            c if c == quote => return Some(at + 1),
            _ => {}
        }
    }
    None
}

/// What is between the quotes of a literal, its escapes resolved; `None` when one is invalid or the
/// result is not UTF-8.
fn unquote(inside: &str, quote: char) -> Option<String> {
    let mut bytes = Vec::with_capacity(inside.len());
    let mut rest = inside;
    loop {
        let mut chars = rest.chars();
        let Some(c) = chars.next() else { break };
        if c != '\\' {
            bytes.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes());
            rest = chars.as_str();
            continue;
        }
        let kind = chars.next()?;
        let after = chars.as_str();
        let (push, used): (Vec<u8>, usize) = match kind {
            'a' => (vec![7], 0),
            'b' => (vec![8], 0),
            'f' => (vec![12], 0),
            'n' => (vec![b'\n'], 0),
            'r' => (vec![b'\r'], 0),
            't' => (vec![b'\t'], 0),
            'v' => (vec![11], 0),
            '\\' => (vec![b'\\'], 0),
            c if c == quote => (vec![u8::try_from(quote).ok()?], 0),
            'x' => (vec![u8::try_from(digits(after, 2, 16)?).ok()?], 2),
            'u' | 'U' => {
                let count = if kind == 'u' { 4 } else { 8 };
                let c = char::from_u32(digits(after, count, 16)?)?;
                (c.encode_utf8(&mut [0; 4]).as_bytes().to_vec(), count)
            }
            '0'..='7' => {
                let octal = rest.get(1..)?;
                let byte = u8::try_from(digits(octal, 3, 8)?).ok()?;
                (vec![byte], 2)
            }
            _ => return None,
        };
        bytes.extend(push);
        rest = after.get(used..)?;
    }
    String::from_utf8(bytes).ok()
}

fn digits(text: &str, count: usize, radix: u32) -> Option<u32> {
    let text = text.get(..count)?;
    text.chars()
        .all(|c| c.is_digit(radix))
        .then(|| u32::from_str_radix(text, radix).ok())?
}
