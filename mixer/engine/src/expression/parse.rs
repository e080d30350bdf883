//! Tokens to syntax: Go's expression grammar, less what has no meaning here.

use super::scan::{Spanned, Token, is_keyword, scan};
use super::syntax::{BINARY, Expr, Kind, UNARY};
use super::{CompileError, MAX_BYTES, MAX_DEPTH, MAX_NESTING};
use crate::text::Text;
use crate::value::{Value, parse_duration};

/// Parses an expression.
pub(crate) fn parse(text: &str, outputs: bool) -> Result<Expr, CompileError> {
    if text.len() > MAX_BYTES {
        return Err(CompileError::new(
            0,
            format!("expression is longer than {MAX_BYTES} bytes"),
        ));
    }
    let mut parser = Parser {
        text,
        tokens: scan(text, outputs)?,
        next: 0,
        nesting: 0,
    };
    let expr = parser.expression(1)?;
    match parser.peek() {
        Token::End => Ok(expr),
        Token::Op("=") => Err(parser.fail("expected '=='")),
        Token::Op("{") => Err(parser.unexpected("a composite literal")),
        _ => Err(parser.fail("expected 'EOF'")),
    }
}

struct Parser<'t> {
    text: &'t str,
    tokens: Vec<Spanned>,
    next: usize,
    nesting: usize,
}

static END: Token = Token::End;

impl Parser<'_> {
    fn peek(&self) -> &Token {
        self.tokens.get(self.next).map_or(&END, |t| &t.token)
    }

    fn at(&self) -> usize {
        self.tokens.get(self.next).map_or(self.text.len(), |t| t.at)
    }

    fn advance(&mut self) -> Token {
        let token = self.peek().clone();
        self.next += 1;
        token
    }

    fn eat(&mut self, operator: &str) -> bool {
        let found = matches!(self.peek(), Token::Op(op) if *op == operator);
        self.next += usize::from(found);
        found
    }

    fn fail(&self, expected: &str) -> CompileError {
        let found = self.peek().describe();
        CompileError::syntax(self.text, self.at(), &format!("{expected}, found {found}"))
    }

    fn unexpected(&self, what: &str) -> CompileError {
        CompileError::new(self.at(), format!("unexpected expression: {what}"))
    }

    /// Runs a rule that recurses, within the limit on nesting.
    fn nested<T>(
        &mut self,
        rule: impl FnOnce(&mut Self) -> Result<T, CompileError>,
    ) -> Result<T, CompileError> {
        self.nesting += 1;
        if self.nesting > MAX_NESTING {
            return Err(CompileError::new(
                self.at(),
                format!("expression is nested more than {MAX_NESTING} deep"),
            ));
        }
        let result = rule(self)?;
        self.nesting -= 1;
        Ok(result)
    }

    /// A call, within the limit on depth: chains of operators nest to the left without recursion here, but
    /// everyone else walks the tree.
    fn call(
        &self,
        at: usize,
        name: &str,
        target: Option<Expr>,
        args: Vec<Expr>,
    ) -> Result<Expr, CompileError> {
        let expr = Expr::call(at, name, target, args);
        if expr.depth > MAX_DEPTH {
            return Err(CompileError::new(
                at,
                format!("expression is more than {MAX_DEPTH} operations deep"),
            ));
        }
        Ok(expr)
    }

    fn expression(&mut self, lowest: u8) -> Result<Expr, CompileError> {
        let mut left = self.unary()?;
        loop {
            let Token::Op(op) = *self.peek() else {
                return Ok(left);
            };
            if op == "=" && lowest <= 3 {
                return Err(self.fail("expected '=='"));
            }
            let Some((_, name, precedence)) =
                BINARY.iter().find(|(o, _, p)| *o == op && *p >= lowest)
            else {
                return Ok(left);
            };
            let at = self.at();
            self.advance();
            let right = self.nested(|p| p.expression(precedence + 1))?;
            left = self.call(at, name, None, vec![left, right])?;
        }
    }

    fn unary(&mut self) -> Result<Expr, CompileError> {
        let Token::Op(op) = *self.peek() else {
            return self.primary();
        };
        if op == "*" {
            return Err(self.unexpected("a dereference"));
        }
        let Some((_, name)) = UNARY.iter().find(|(o, _)| *o == op) else {
            return self.primary();
        };
        let at = self.at();
        self.advance();
        let operand = self.nested(Parser::unary)?;
        self.call(at, name, None, vec![operand])
    }

    fn primary(&mut self) -> Result<Expr, CompileError> {
        let mut expr = self.operand()?;
        // Whether `expr` is a name that dots may still lengthen.
        let mut open = matches!(
            self.tokens.get(self.next.wrapping_sub(1)),
            Some(Spanned {
                token: Token::Ident(_),
                ..
            })
        ) && matches!(expr.kind, Kind::Attribute(_));
        loop {
            let at = self.at();
            match self.peek() {
                Token::Op(".") => {
                    self.advance();
                    if matches!(self.peek(), Token::Op("(")) {
                        return Err(self.unexpected("a type assertion"));
                    }
                    let member = match self.peek() {
                        Token::Ident(name) if !is_keyword(name) => name.clone(),
                        _ => return Err(self.fail("expected selector or type assertion")),
                    };
                    self.advance();
                    if self.eat("(") {
                        let args = self.arguments()?;
                        expr = self.call(at, &member, Some(settle(expr, open)), args)?;
                        open = false;
                        continue;
                    }
                    match &mut expr.kind {
                        Kind::Attribute(name) if open => {
                            name.push('.');
                            name.push_str(&member);
                        }
                        _ => return Err(CompileError::new(at, "unexpected expression: a field")),
                    }
                }
                Token::Op("[") => {
                    self.advance();
                    if matches!(self.peek(), Token::Op(":")) {
                        return Err(self.unexpected("a slice"));
                    }
                    let key = self.nested(|p| p.expression(1))?;
                    if matches!(self.peek(), Token::Op(":")) {
                        return Err(self.unexpected("a slice"));
                    }
                    if !self.eat("]") {
                        return Err(self.fail("expected ']'"));
                    }
                    expr = self.call(at, "INDEX", None, vec![settle(expr, open), key])?;
                    open = false;
                }
                Token::Op("(") => {
                    // A name without dots is a function; with dots the last part is a method, which the arm
                    // for `.` has seen.
                    let function = match &expr.kind {
                        Kind::Attribute(name) if open && !name.contains('.') => name.clone(),
                        _ => return Err(self.unexpected("a call of what is no function")),
                    };
                    self.advance();
                    let args = self.arguments()?;
                    expr = self.call(expr.at, &function, None, args)?;
                    open = false;
                }
                Token::Op("{") => return Err(self.unexpected("a composite literal")),
                _ => break,
            }
        }
        Ok(settle(expr, open))
    }

    fn arguments(&mut self) -> Result<Vec<Expr>, CompileError> {
        let mut args = Vec::new();
        loop {
            if self.eat(")") {
                return Ok(args);
            }
            args.push(self.nested(|p| p.expression(1))?);
            if !self.eat(",") {
                if self.eat(")") {
                    return Ok(args);
                }
                return Err(self.fail("expected ')'"));
            }
        }
    }

    fn operand(&mut self) -> Result<Expr, CompileError> {
        let at = self.at();
        match self.peek() {
            Token::Ident(name) if !is_keyword(name) => {
                let kind = Kind::Attribute(name.clone());
                self.advance();
                Ok(Expr::leaf(at, kind))
            }
            Token::Op("(") => {
                self.advance();
                let inner = self.nested(|p| p.expression(1))?;
                if !self.eat(")") {
                    return Err(self.fail("expected ')'"));
                }
                Ok(inner)
            }
            Token::Op("[") => Err(self.unexpected("a type")),
            Token::Int(_) | Token::Float(_) | Token::Str(..) => {
                let token = self.advance();
                self.literal(at, token)
            }
            _ => Err(self.fail("expected operand")),
        }
    }

    fn literal(&self, at: usize, token: Token) -> Result<Expr, CompileError> {
        let fail = |kind: &str, source: &str, reason: &str| {
            Err(CompileError::new(
                at,
                format!("parsing {kind} \"{source}\": {reason}"),
            ))
        };
        let kind = match token {
            Token::Int(source)
                if source.len() > 1
                    && source.starts_with('0')
                    && source.contains(['8', '9'])
                    && source.bytes().all(|b| b.is_ascii_digit()) =>
            {
                return Err(CompileError::syntax(self.text, at, "illegal octal number"));
            }
            Token::Int(source) => {
                if !source.bytes().all(|b| b.is_ascii_digit()) {
                    return fail("INT64", &source, "invalid syntax");
                }
                match source.parse() {
                    Ok(number) => Kind::Literal(source, Value::Int64(number)),
                    Err(_) => return fail("INT64", &source, "value out of range"),
                }
            }
            Token::Float(source) => match source.parse::<f64>() {
                Ok(number) if number.is_finite() => Kind::Literal(source, Value::Double(number)),
                Ok(_) => return fail("DOUBLE", &source, "value out of range"),
                Err(_) => return fail("DOUBLE", &source, "invalid syntax"),
            },
            Token::Str(source, meaning) => {
                let value = match parse_duration(&meaning) {
                    Some(span) => Value::Duration(span),
                    None => Value::String(Text::from(meaning)),
                };
                Kind::Literal(source, value)
            }
            Token::Ident(_) | Token::Op(_) | Token::End => {
                return Err(self.fail("expected operand"));
            }
        };
        Ok(Expr::leaf(at, kind))
    }
}

/// A name that neither dots nor a call can change any more: `true` and `false`, in any letter case, are
/// literals.
fn settle(expr: Expr, open: bool) -> Expr {
    let truth = match &expr.kind {
        Kind::Attribute(name) if open && name.eq_ignore_ascii_case("true") => true,
        Kind::Attribute(name) if open && name.eq_ignore_ascii_case("false") => false,
        _ => return expr,
    };
    Expr::leaf(
        expr.at,
        Kind::Literal(truth.to_string(), Value::Bool(truth)),
    )
}
