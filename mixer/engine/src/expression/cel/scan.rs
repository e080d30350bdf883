//! Characters to tokens, as the CEL specification has them.

use crate::expression::CompileError;

/// A token; operators carry their own text. Numbers are kept as written, less the `u` of a uint.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Token {
    Ident(String),
    Int(String),
    Uint(String),
    Double(String),
    Str(String),
    Bytes(Vec<u8>),
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
            Token::Ident(text) | Token::Int(text) | Token::Double(text) => format!("'{text}'"),
            Token::Uint(text) => format!("'{text}u'"),
            Token::Str(text) => format!("{text:?}"),
            Token::Bytes(_) => "bytes".to_owned(),
            Token::Op(text) => format!("'{text}'"),
            Token::End => "the end".to_owned(),
        }
    }
}

/// Longest first.
const OPERATORS: [&str; 23] = [
    "||", "&&", "==", "!=", "<=", ">=", "<", ">", "+", "-", "*", "/", "%", "!", "?", ":", "(", ")",
    "[", "]", "{", "}", ",",
];

/// Splits text into tokens; the last one is [`Token::End`].
pub(super) fn scan(text: &str) -> Result<Vec<Spanned>, CompileError> {
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
        if matches!(first, ' ' | '\t' | '\r' | '\n' | '\u{c}') {
            at += 1;
            continue;
        }
        if rest.starts_with("//") {
            at += rest.find('\n').unwrap_or(rest.len());
            continue;
        }
        let (token, length) = token(rest, first)
            .map_err(|reason| CompileError::syntax(text, at, &format!("Syntax error: {reason}")))?;
        tokens.push(Spanned { token, at });
        at += length.max(1);
    }
}

fn token(rest: &str, first: char) -> Result<(Token, usize), String> {
    if let Some(found) = literal(rest) {
        return found;
    }
    if first == '_' || first.is_ascii_alphabetic() {
        let end = rest
            .find(|c: char| c != '_' && !c.is_ascii_alphanumeric())
            .unwrap_or(rest.len());
        let name = rest.get(..end).unwrap_or_default();
        return Ok((Token::Ident(name.to_owned()), end));
    }
    let digit_follows = rest.as_bytes().get(1).is_some_and(u8::is_ascii_digit);
    if first.is_ascii_digit() || (first == '.' && digit_follows) {
        return Ok(number(rest));
    }
    if first == '.' {
        return Ok((Token::Op("."), 1));
    }
    match OPERATORS.iter().find(|op| rest.starts_with(**op)) {
        Some(op) => Ok((Token::Op(op), op.len())),
        None => Err(format!("token recognition error at: '{first}'")),
    }
}

fn number(rest: &str) -> (Token, usize) {
    let digits = |from: usize, radix: u32| {
        let tail = rest.get(from..).unwrap_or_default();
        from + tail
            .find(|c: char| !c.is_digit(radix))
            .unwrap_or(tail.len())
    };
    let byte = |at: usize| rest.as_bytes().get(at).copied().unwrap_or(0);
    let mut end;
    let mut is_double = false;
    if rest.starts_with("0x") || rest.starts_with("0X") {
        end = digits(2, 16);
    } else {
        end = digits(0, 10);
        if byte(end) == b'.' && byte(end + 1).is_ascii_digit() {
            is_double = true;
            end = digits(end + 1, 10);
        }
        if matches!(byte(end), b'e' | b'E') {
            let sign = usize::from(matches!(byte(end + 1), b'+' | b'-'));
            if byte(end + 1 + sign).is_ascii_digit() {
                is_double = true;
                end = digits(end + 1 + sign, 10);
            }
        }
    }
    let text = rest.get(..end).unwrap_or_default().replace("0X", "0x");
    if is_double {
        (Token::Double(text), end)
    } else if matches!(byte(end), b'u' | b'U') {
        (Token::Uint(text), end + 1)
    } else {
        (Token::Int(text), end)
    }
}

/// A string or bytes literal with its prefix: `"x"`, `r'x'`, `b"""x"""`.
fn literal(rest: &str) -> Option<Result<(Token, usize), String>> {
    let (mut is_raw, mut is_bytes) = (false, false);
    let mut start = 0;
    for c in rest.chars().take(2) {
        match c {
            'r' | 'R' if !is_raw => is_raw = true,
            'b' | 'B' if !is_bytes => is_bytes = true,
            _ => break,
        }
        start += 1;
    }
    let body = rest.get(start..)?;
    let quote = ["\"\"\"", "'''", "\"", "'"]
        .into_iter()
        .find(|q| body.starts_with(q))?;
    Some(quoted(body, quote, is_raw, is_bytes).map(|(token, length)| (token, start + length)))
}

fn quoted(body: &str, quote: &str, is_raw: bool, is_bytes: bool) -> Result<(Token, usize), String> {
    let is_long = quote.len() == 3;
    let mut bytes = Vec::new();
    let mut at = quote.len();
    loop {
        let rest = body.get(at..).unwrap_or_default();
        if rest.starts_with(quote) {
            break;
        }
        let Some(c) = rest.chars().next() else {
            return Err("string literal not terminated".to_owned());
        };
        match c {
            '\n' | '\r' if !is_long => return Err("string literal not terminated".to_owned()),
            '\\' if !is_raw => {
                let length = escape(rest, is_bytes, &mut bytes)
                    .ok_or_else(|| "unknown or invalid escape sequence".to_owned())?;
                at += length;
            }
            c => {
                bytes.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes());
                at += c.len_utf8();
            }
        }
    }
    let length = at + quote.len();
    if is_bytes {
        return Ok((Token::Bytes(bytes), length));
    }
    let text = String::from_utf8(bytes).map_err(|_| "a string must be UTF-8".to_owned())?;
    Ok((Token::Str(text), length))
}

/// Adds what the escape at the start of `rest` means; answers with its length.
fn escape(rest: &str, is_bytes: bool, out: &mut Vec<u8>) -> Option<usize> {
    let kind = rest.chars().nth(1)?;
    let number = |from: usize, count: usize, radix: u32| {
        let text = rest.get(from..from + count)?;
        let all_digits = text.chars().all(|c| c.is_digit(radix));
        all_digits.then(|| u32::from_str_radix(text, radix).ok())?
    };
    let mut code = |value: u32| {
        if is_bytes {
            out.push(u8::try_from(value).ok()?);
        } else {
            let c = char::from_u32(value)?;
            out.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes());
        }
        Some(())
    };
    let simple = match kind {
        'a' => 7,
        'b' => 8,
        'f' => 12,
        'n' => 10,
        'r' => 13,
        't' => 9,
        'v' => 11,
        '\\' | '?' | '"' | '\'' | '`' => u32::from(kind),
        'x' | 'X' => {
            code(number(2, 2, 16)?)?;
            return Some(4);
        }
        'u' if !is_bytes => {
            code(number(2, 4, 16)?)?;
            return Some(6);
        }
        'U' if !is_bytes => {
            code(number(2, 8, 16)?)?;
            return Some(10);
        }
        '0'..='3' => {
            code(number(1, 3, 8)?)?;
            return Some(4);
        }
        _ => return None,
    };
    code(simple)?;
    Some(2)
}
