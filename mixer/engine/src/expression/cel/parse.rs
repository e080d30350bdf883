//! CEL text to syntax: the grammar of the CEL specification, with the macros it defines and Istio's two
//! (`conditional`, `pick`). No word is reserved but `true`, `false`, `null` and `in`: attributes are older than
//! CEL's list of reserved words.

use super::MAX_DEPTH;
use super::scan::{Spanned, Token, scan};
use super::syntax::{Expr, Kind, Loop};
use super::value::Val;
use crate::expression::{CompileError, MAX_BYTES, MAX_NESTING};

/// Parses an expression.
pub(crate) fn parse(text: &str) -> Result<Expr, CompileError> {
    if text.len() > MAX_BYTES {
        return Err(CompileError::new(
            0,
            format!("expression is longer than {MAX_BYTES} bytes"),
        ));
    }
    let mut parser = Parser {
        text,
        tokens: scan(text)?,
        next: 0,
        nesting: 0,
    };
    let expr = parser.expression()?;
    match parser.peek() {
        Token::End => Ok(expr),
        _ => Err(parser.fail("expected the end")),
    }
}

/// Binary operators: source form, function, precedence (higher binds tighter).
const BINARY: [(&str, &str, u8); 14] = [
    ("||", "_||_", 1),
    ("&&", "_&&_", 2),
    ("==", "_==_", 3),
    ("!=", "_!=_", 3),
    ("<", "_<_", 3),
    ("<=", "_<=_", 3),
    (">", "_>_", 3),
    (">=", "_>=_", 3),
    ("in", "_in_", 3),
    ("+", "_+_", 4),
    ("-", "_-_", 4),
    ("*", "_*_", 5),
    ("/", "_/_", 5),
    ("%", "_%_", 5),
];

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

    fn expect(&mut self, operator: &str) -> Result<(), CompileError> {
        if self.eat(operator) {
            Ok(())
        } else {
            Err(self.fail(&format!("expected '{operator}'")))
        }
    }

    fn fail(&self, expected: &str) -> CompileError {
        let found = self.peek().describe();
        let reason = format!("Syntax error: {expected}, found {found}");
        CompileError::syntax(self.text, self.at(), &reason)
    }

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

    fn node(&self, at: usize, kind: Kind) -> Result<Expr, CompileError> {
        bounded(Expr::new(at, kind))
    }

    fn expression(&mut self) -> Result<Expr, CompileError> {
        let condition = self.binary(1)?;
        let at = self.at();
        if !self.eat("?") {
            return Ok(condition);
        }
        let yes = self.nested(|p| p.binary(1))?;
        self.expect(":")?;
        let no = self.nested(Parser::expression)?;
        self.node(at, Kind::call("_?_:_", vec![condition, yes, no]))
    }

    fn binary(&mut self, lowest: u8) -> Result<Expr, CompileError> {
        let mut left = self.unary()?;
        loop {
            let op = match self.peek() {
                Token::Op(op) => *op,
                Token::Ident(name) if name == "in" => "in",
                _ => return Ok(left),
            };
            let found = BINARY.iter().find(|(o, _, p)| *o == op && *p >= lowest);
            let Some((_, name, precedence)) = found else {
                return Ok(left);
            };
            let at = self.at();
            self.advance();
            let right = self.nested(|p| p.binary(precedence + 1))?;
            left = self.node(at, join(name, left, right))?;
        }
    }

    fn unary(&mut self) -> Result<Expr, CompileError> {
        let at = self.at();
        if self.eat("!") {
            let operand = self.nested(Parser::unary)?;
            return self.node(at, Kind::call("!_", vec![operand]));
        }
        if self.eat("-") {
            // The smallest integer has no positive counterpart.
            let negative = match self.peek() {
                Token::Int(digits) => Some(Token::Int(format!("-{digits}"))),
                Token::Double(digits) => Some(Token::Double(format!("-{digits}"))),
                _ => None,
            };
            if let (Some(negative), Some(place)) = (negative, self.tokens.get_mut(self.next)) {
                place.token = negative;
                return self.member();
            }
            let operand = self.nested(Parser::unary)?;
            return self.node(at, Kind::call("-_", vec![operand]));
        }
        self.member()
    }

    fn member(&mut self) -> Result<Expr, CompileError> {
        let mut expr = self.primary()?;
        loop {
            let mut at = self.at();
            if self.eat(".") {
                at = self.at();
                let Token::Ident(name) = self.peek().clone() else {
                    return Err(self.fail("expected a field or a method"));
                };
                self.advance();
                expr = if self.eat("(") {
                    let args = self.list(")")?;
                    self.method(at, expr, &name, args)?
                } else {
                    self.node(at, Kind::select(expr, name))?
                };
            } else if self.eat("[") {
                let key = self.nested(Parser::expression)?;
                self.expect("]")?;
                expr = self.node(at, Kind::call("_[_]", vec![expr, key]))?;
            } else if matches!(self.peek(), Token::Op("{"))
                && let Some(name) = expr.path()
            {
                self.advance();
                let fields = self.fields()?;
                expr = self.node(at, Kind::Message(name, fields))?;
            } else {
                return Ok(expr);
            }
        }
    }

    fn primary(&mut self) -> Result<Expr, CompileError> {
        let at = self.at();
        let token = self.advance();
        let literal = |value| Ok(Expr::new(at, Kind::Literal(value)));
        match token {
            Token::Op(".") => match self.advance() {
                Token::Ident(name) => self.name(at, name),
                _ => {
                    self.next -= 1;
                    Err(self.fail("expected a name"))
                }
            },
            Token::Ident(name) => match name.as_str() {
                "true" => literal(Val::Bool(true)),
                "false" => literal(Val::Bool(false)),
                "null" => literal(Val::Null),
                "in" => {
                    self.next -= 1;
                    Err(self.fail("expected an operand"))
                }
                _ => self.name(at, name),
            },
            Token::Op("(") => {
                let inner = self.nested(Parser::expression)?;
                self.expect(")")?;
                Ok(inner)
            }
            Token::Op("[") => {
                let items = self.list("]")?;
                self.node(at, Kind::List(items))
            }
            Token::Op("{") => {
                let entries = self.entries()?;
                self.node(at, Kind::Map(entries))
            }
            Token::Int(digits) => match int(&digits) {
                Some(value) => literal(Val::Int(value)),
                None => Err(CompileError::new(
                    at,
                    format!("invalid int literal {digits}"),
                )),
            },
            Token::Uint(digits) => match uint(&digits) {
                Some(value) => literal(Val::Uint(value)),
                None => Err(CompileError::new(
                    at,
                    format!("invalid uint literal {digits}u"),
                )),
            },
            Token::Double(digits) => match digits.parse::<f64>() {
                Ok(value) if value.is_finite() => literal(Val::Double(value)),
                _ => Err(CompileError::new(
                    at,
                    format!("invalid double literal {digits}"),
                )),
            },
            Token::Str(text) => literal(Val::Text(text.into())),
            Token::Bytes(bytes) => literal(Val::Bytes(bytes.into())),
            Token::Op(_) | Token::End => {
                self.next -= 1;
                Err(self.fail("expected an operand"))
            }
        }
    }

    fn name(&mut self, at: usize, name: String) -> Result<Expr, CompileError> {
        if !self.eat("(") {
            return Ok(Expr::new(at, Kind::Ident(name)));
        }
        let args = self.list(")")?;
        match (name.as_str(), args.as_slice()) {
            ("has", [only]) => match &only.kind {
                Kind::Select {
                    operand,
                    field,
                    is_test: false,
                } => {
                    let kind = Kind::Select {
                        operand: operand.clone(),
                        field: field.clone(),
                        is_test: true,
                    };
                    self.node(at, kind)
                }
                _ => Err(CompileError::new(at, "invalid argument to has() macro")),
            },
            ("conditional", [_, _, _]) => self.node(at, Kind::call("_?_:_", args)),
            ("pick", [_, ..]) => pick(at, args).and_then(|kind| self.node(at, kind)),
            _ => self.node(at, Kind::call(&name, args)),
        }
    }

    fn method(
        &self,
        at: usize,
        target: Expr,
        name: &str,
        args: Vec<Expr>,
    ) -> Result<Expr, CompileError> {
        let kind = match (name, args.len()) {
            ("all", 2) => Loop::All,
            ("exists", 2) => Loop::Exists,
            ("exists_one", 2) => Loop::ExistsOne,
            ("filter", 2) => Loop::Filter,
            ("map", 2) => Loop::Map,
            ("map", 3) => Loop::FilterMap,
            ("conditional" | "pick", _) => {
                return Err(CompileError::new(
                    at,
                    format!("unexpected target in {name}()"),
                ));
            }
            _ => {
                let kind = Kind::Call {
                    name: name.to_owned(),
                    target: Some(Box::new(target)),
                    args,
                };
                return self.node(at, kind);
            }
        };
        let mut args = args.into_iter();
        let variable = match args.next().map(|e| e.kind) {
            Some(Kind::Ident(name)) => name,
            _ => return Err(CompileError::new(at, "argument must be a simple name")),
        };
        let kind = Kind::Loop {
            kind,
            range: Box::new(target),
            variable,
            body: args.collect(),
        };
        self.node(at, kind)
    }

    /// Expressions up to `close`.
    fn list(&mut self, close: &str) -> Result<Vec<Expr>, CompileError> {
        let mut items = Vec::new();
        loop {
            if self.eat(close) {
                return Ok(items);
            }
            items.push(self.nested(Parser::expression)?);
            if !self.eat(",") {
                self.expect(close)?;
                return Ok(items);
            }
        }
    }

    fn entries(&mut self) -> Result<Vec<(Expr, Expr)>, CompileError> {
        let mut entries = Vec::new();
        loop {
            if self.eat("}") {
                return Ok(entries);
            }
            let key = self.nested(Parser::expression)?;
            self.expect(":")?;
            entries.push((key, self.nested(Parser::expression)?));
            if !self.eat(",") {
                self.expect("}")?;
                return Ok(entries);
            }
        }
    }

    fn fields(&mut self) -> Result<Vec<(String, Expr)>, CompileError> {
        let mut fields = Vec::new();
        loop {
            if self.eat("}") {
                return Ok(fields);
            }
            let Token::Ident(name) = self.peek().clone() else {
                return Err(self.fail("expected a field"));
            };
            self.advance();
            self.expect(":")?;
            fields.push((name, self.nested(Parser::expression)?));
            if !self.eat(",") {
                self.expect("}")?;
                return Ok(fields);
            }
        }
    }
}

/// An expression within the limit on depth.
pub(super) fn bounded(expr: Expr) -> Result<Expr, CompileError> {
    if expr.depth > MAX_DEPTH {
        return Err(CompileError::new(
            expr.at,
            format!("expression is more than {MAX_DEPTH} operations deep"),
        ));
    }
    Ok(expr)
}

/// A binary operation. Chains of `&&` and of `||`, which may be long, are one call of many operands.
fn join(name: &str, left: Expr, right: Expr) -> Kind {
    match left.kind {
        Kind::Call {
            name: same,
            target: None,
            mut args,
        } if same == name && matches!(name, "_&&_" | "_||_") => {
            args.push(right);
            Kind::call(name, args)
        }
        kind => Kind::call(name, vec![Expr { kind, ..left }, right]),
    }
}

/// `pick(a, b, c)`: the first that is present. A field is present when the request has it, a key when the map
/// has it, and anything else always.
pub(super) fn pick(at: usize, args: Vec<Expr>) -> Result<Kind, CompileError> {
    let mut args = args.into_iter().rev();
    let Some(mut rest) = args.next() else {
        return Err(CompileError::new(at, "pick() needs an argument"));
    };
    for arg in args {
        let is_present = match &arg.kind {
            Kind::Select { is_test: true, .. } => {
                return Err(CompileError::new(
                    at,
                    "unsupported use of has() macro in pick()",
                ));
            }
            Kind::Select { operand, field, .. } => Kind::Select {
                operand: operand.clone(),
                field: field.clone(),
                is_test: true,
            },
            Kind::Call { name, args, .. } if name == "_[_]" => {
                Kind::call("_in_", args.iter().rev().cloned().collect())
            }
            _ => {
                rest = arg;
                continue;
            }
        };
        let condition = Expr::new(arg.at, is_present);
        rest = Expr::new(at, Kind::call("_?_:_", vec![condition, arg, rest]));
    }
    Ok(rest.kind)
}

fn int(digits: &str) -> Option<i64> {
    match digits.strip_prefix('-') {
        Some(rest) if rest.starts_with("0x") => {
            i64::try_from(-i128::from(u64::from_str_radix(rest.get(2..)?, 16).ok()?)).ok()
        }
        _ => match digits.strip_prefix("0x") {
            Some(hex) => i64::from_str_radix(hex, 16).ok(),
            None => digits.parse().ok(),
        },
    }
}

fn uint(digits: &str) -> Option<u64> {
    match digits.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16).ok(),
        None => digits.parse().ok(),
    }
}
