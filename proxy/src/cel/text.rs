//! Expressions that come parsed, as text again: one parser and one evaluator serve both forms.

use lateen_protocols::envoy::google::api::expr::v1alpha1::{
    Constant, Expr, constant::ConstantKind, expr::ExprKind, expr::create_struct::entry::KeyKind,
};

use crate::{config_error::ConfigError, proto::invalid};

/// Deepest tree.
const MAX_DEPTH: usize = 100;

/// The text of a tree, with parentheses around every call.
///
/// # Errors
/// When a part is absent, or could not have come from text.
pub(super) fn of(tree: &Expr) -> Result<String, ConfigError> {
    let mut out = String::new();
    write(tree, 0, &mut out)?;
    Ok(out)
}

fn wrong(why: &str) -> ConfigError {
    invalid("expr", why)
}

fn write(tree: &Expr, depth: usize, out: &mut String) -> Result<(), ConfigError> {
    if depth > MAX_DEPTH {
        return Err(wrong("deeper than 100 levels"));
    }
    let depth = depth + 1;
    let required = |part: &Option<Box<Expr>>| part.clone().ok_or_else(|| wrong("a part is absent"));
    match tree.expr_kind.as_ref().ok_or_else(|| wrong("absent"))? {
        ExprKind::ConstExpr(constant) => write_constant(constant, out)?,
        ExprKind::IdentExpr(ident) => out.push_str(name(&ident.name)?),
        ExprKind::SelectExpr(select) => {
            let open = if select.test_only { "has(" } else { "" };
            out.push_str(open);
            write(&*required(&select.operand)?, depth, out)?;
            out.push('.');
            out.push_str(name(&select.field)?);
            if select.test_only {
                out.push(')');
            }
        }
        ExprKind::CallExpr(call) => {
            let args: Vec<&Expr> = call
                .target
                .as_deref()
                .into_iter()
                .chain(&call.args)
                .collect();
            write_call(&call.function, &args, call.target.is_some(), depth, out)?;
        }
        ExprKind::ListExpr(list) => {
            out.push('[');
            write_all(&list.elements.iter().collect::<Vec<_>>(), depth, out)?;
            out.push(']');
        }
        ExprKind::StructExpr(fields) if fields.message_name.is_empty() => {
            out.push('{');
            for (index, entry) in fields.entries.iter().enumerate() {
                if index > 0 {
                    out.push_str(", ");
                }
                let Some(KeyKind::MapKey(key)) = &entry.key_kind else {
                    return Err(wrong("an entry of a map has no key"));
                };
                write(key, depth, out)?;
                out.push_str(": ");
                let value = entry.value.as_ref();
                write(value.ok_or_else(|| wrong("a part is absent"))?, depth, out)?;
            }
            out.push('}');
        }
        ExprKind::StructExpr(_) => return Err(wrong("messages cannot be made")),
        ExprKind::ComprehensionExpr(_) => {
            return Err(wrong(
                "expansions of macros (all, exists, map, filter) are not supported in a parsed expression; give the \
                 condition without them",
            ));
        }
    }
    Ok(())
}

/// How operators are written between what they join.
fn infix(function: &str) -> Option<&'static str> {
    Some(match function {
        "_==_" => "==",
        "_!=_" => "!=",
        "_<_" => "<",
        "_<=_" => "<=",
        "_>_" => ">",
        "_>=_" => ">=",
        "_&&_" => "&&",
        "_||_" => "||",
        "_+_" => "+",
        "_-_" => "-",
        "_*_" => "*",
        "_/_" => "/",
        "_%_" => "%",
        "@in" | "_in_" | "in" => "in",
        _ => return None,
    })
}

fn write_call(
    function: &str,
    args: &[&Expr],
    has_target: bool,
    depth: usize,
    out: &mut String,
) -> Result<(), ConfigError> {
    match (function, args) {
        (operator, [left, right]) if infix(operator).is_some() => {
            let operator = infix(operator).unwrap_or_default();
            out.push('(');
            write(left, depth, out)?;
            for part in [" ", operator, " "] {
                out.push_str(part);
            }
            write(right, depth, out)?;
            out.push(')');
        }
        ("!_" | "-_", [operand]) => {
            out.push('(');
            out.push_str(&function[..1]);
            write(operand, depth, out)?;
            out.push(')');
        }
        ("_?_:_", [condition, yes, no]) => {
            out.push('(');
            write(condition, depth, out)?;
            out.push_str(" ? ");
            write(yes, depth, out)?;
            out.push_str(" : ");
            write(no, depth, out)?;
            out.push(')');
        }
        ("_[_]", [from, index]) => {
            write(from, depth, out)?;
            out.push('[');
            write(index, depth, out)?;
            out.push(']');
        }
        (method, [target, rest @ ..]) if has_target => {
            write(target, depth, out)?;
            out.push('.');
            out.push_str(name(method)?);
            out.push('(');
            write_all(rest, depth, out)?;
            out.push(')');
        }
        (function, args) => {
            out.push_str(name(function)?);
            out.push('(');
            write_all(args, depth, out)?;
            out.push(')');
        }
    }
    Ok(())
}

fn write_all(list: &[&Expr], depth: usize, out: &mut String) -> Result<(), ConfigError> {
    for (index, element) in list.iter().enumerate() {
        if index > 0 {
            out.push_str(", ");
        }
        write(element, depth, out)?;
    }
    Ok(())
}

/// A name as text may have it: nothing else can get in by one.
fn name(name: &str) -> Result<&str, ConfigError> {
    let is_one = !name.starts_with(|c: char| c.is_ascii_digit())
        && !name.is_empty()
        && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
    match is_one {
        true => Ok(name),
        false => Err(wrong(&format!("{name:?} is no name"))),
    }
}

fn write_constant(constant: &Constant, out: &mut String) -> Result<(), ConfigError> {
    let kind = constant.constant_kind.as_ref();
    match kind.ok_or_else(|| wrong("a constant has no value"))? {
        ConstantKind::NullValue(_) => out.push_str("null"),
        ConstantKind::BoolValue(value) => out.push_str(&value.to_string()),
        ConstantKind::Int64Value(value) => out.push_str(&format!("({value})")),
        ConstantKind::Uint64Value(value) => out.push_str(&format!("{value}u")),
        ConstantKind::DoubleValue(value) if value.is_finite() => {
            out.push_str(&format!("({value:?})"));
        }
        ConstantKind::StringValue(text) => write_text(text, out),
        _ => return Err(wrong("a constant of a kind that is not supported")),
    }
    Ok(())
}

fn write_text(text: &str, out: &mut String) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' | '\\' => {
                out.push('\\');
                out.push(c);
            }
            c if c.is_control() => out.push_str(&format!("\\u{:04x}", u32::from(c))),
            c => out.push(c),
        }
    }
    out.push('"');
}

#[cfg(test)]
mod tests {
    use lateen_protocols::json;

    use super::*;

    fn tree(yaml: &str) -> Expr {
        json::from_yaml(yaml).unwrap()
    }

    #[test]
    fn trees_become_the_text_they_came_from() {
        let path = "select_expr: {operand: {ident_expr: {name: request}}, field: path}";
        let same = tree(&format!(
            "call_expr: {{function: '_==_', args: [{{{path}}}, {{const_expr: {{string_value: \"a\\\"b\"}}}}]}}"
        ));
        assert_eq!(of(&same).unwrap(), r#"(request.path == "a\"b")"#);
        let starts = tree(&format!(
            "call_expr: {{target: {{{path}}}, function: startsWith, args: [{{const_expr: {{string_value: /}}}}]}}"
        ));
        assert_eq!(of(&starts).unwrap(), r#"request.path.startsWith("/")"#);
    }

    #[test]
    fn names_carry_nothing_but_names() {
        let odd = tree("ident_expr: {name: 'true || x'}");
        assert!(of(&odd).is_err());
    }
}
