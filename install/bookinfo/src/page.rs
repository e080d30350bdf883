//! The HTML of productpage; texts and marks as in the original, so that its tasks can be followed.

use serde_json::{Value, json};

const STYLE: &str = "body{font:16px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}\
nav{display:flex;justify-content:space-between;border-bottom:1px solid #ccc}\
.columns{display:flex;gap:3em}.columns>div{flex:1}dt{font-weight:bold}blockquote{border-left:4px solid #ccc;margin:1em 0;padding-left:1em}";

pub(crate) fn product_facts() -> Value {
    json!({
        "id": 0,
        "title": "The Comedy of Errors",
        "descriptionHtml": "<a href=\"https://en.wikipedia.org/wiki/The_Comedy_of_Errors\">Wikipedia Summary</a>: The Comedy of Errors is one of <b>William Shakespeare's</b> early plays. It is his shortest and one of his most farcical comedies, with a major part of the humour coming from slapstick and mistaken identity, in addition to puns and word play.",
    })
}

pub(crate) fn index() -> String {
    document(
        "<h3>Hello! This is a simple bookstore application consisting of three services as shown below</h3>\
         <p>productpage → details, productpage → reviews → ratings</p>\
         <p><a href=\"/productpage?u=normal\">Normal user</a></p><p><a href=\"/productpage?u=test\">Test user</a></p>",
    )
}

/// `Err` carries what the failing service's place is to say.
pub(crate) fn product(
    user: Option<&str>,
    details: Result<&Value, &Value>,
    reviews: Result<&Value, &Value>,
) -> String {
    let facts = product_facts();
    // Ours, not a peer's: markup is wanted.
    let description = facts["descriptionHtml"].as_str().unwrap_or_default();
    let mut body = String::from("<nav><strong>BookInfo Sample</strong>");
    match user {
        Some(user) => {
            body.push_str(&format!("<span>{} (<a href=\"/logout\">sign out</a>)</span>", escape(user)));
        }
        None => body.push_str(
            "<form method=\"post\" action=\"/login\"><input name=\"username\" placeholder=\"User name\"> \
             <input name=\"passwd\" type=\"password\" placeholder=\"Password\"> <button>Sign in</button></form>",
        ),
    }
    body.push_str(&format!(
        "</nav><h3>{}</h3><p>Summary: {}</p><div class=\"columns\"><div>",
        text(&facts["title"]),
        description
    ));
    write_details(&mut body, details);
    body.push_str("</div><div>");
    write_reviews(&mut body, reviews);
    body.push_str("</div></div>");
    document(&body)
}

fn write_details(body: &mut String, details: Result<&Value, &Value>) {
    match details {
        Ok(details) => {
            body.push_str("<h4>Book Details</h4><dl>");
            for (title, field) in [
                ("Type", "type"),
                ("Pages", "pages"),
                ("Publisher", "publisher"),
                ("Language", "language"),
                ("ISBN-10", "ISBN-10"),
                ("ISBN-13", "ISBN-13"),
            ] {
                body.push_str(&format!(
                    "<dt>{title}:</dt><dd>{}</dd>",
                    text(&details[field])
                ));
            }
            body.push_str("</dl>");
        }
        Err(error) => {
            body.push_str(&format!(
                "<h4>Error fetching product details!</h4><p>{}</p>",
                text(&error["error"])
            ));
        }
    }
}

fn write_reviews(body: &mut String, reviews: Result<&Value, &Value>) {
    let reviews = match reviews {
        Ok(reviews) => reviews,
        Err(error) => {
            body.push_str(&format!(
                "<h4>Error fetching product reviews!</h4><p>{}</p>",
                text(&error["error"])
            ));
            return;
        }
    };
    body.push_str("<h4>Book Reviews</h4>");
    for review in reviews["reviews"].as_array().into_iter().flatten() {
        body.push_str(&format!(
            "<blockquote><p>{}</p><small>{}</small>",
            text(&review["text"]),
            text(&review["reviewer"])
        ));
        let rating = &review["rating"];
        if let Some(stars) = rating["stars"].as_u64() {
            let full = usize::try_from(stars.min(5)).unwrap_or(5);
            body.push_str(&format!("<p><font color=\"{}\"><span class=\"glyphicon glyphicon-star\" title=\"{full} stars\">{}</span><span class=\"glyphicon glyphicon-star-empty\">{}</span></font></p>",
                text(&rating["color"]),
                "★".repeat(full),
                "☆".repeat(5 - full)));
        } else if rating["error"].is_string() {
            body.push_str(&format!("<p><i>{}</i></p>", text(&rating["error"])));
        }
        body.push_str("</blockquote>");
    }
}

fn document(body: &str) -> String {
    format!(
        "<!DOCTYPE html>\n<html><head><meta charset=\"utf-8\"><title>Simple Bookstore App</title><style>{STYLE}</style></head><body>{body}</body></html>\n"
    )
}

/// A JSON scalar as HTML text.
fn text(value: &Value) -> String {
    match value {
        Value::String(text) => escape(text),
        Value::Null => String::new(),
        other => escape(&other.to_string()),
    }
}

fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            other => out.push(other),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_shows_stars_errors_and_no_markup_of_others() {
        let reviews = json!({"reviews": [
            {"reviewer": "<b>", "text": "t", "rating": {"stars": 4, "color": "red"}},
            {"reviewer": "r", "text": "t", "rating": {"error": "Ratings service is currently unavailable"}},
        ]});
        let failed =
            json!({"error": "Sorry, product details are currently unavailable for this book."});
        let html = product(Some("jason"), Err(&failed), Ok(&reviews));
        for part in [
            "<title>Simple Bookstore App</title>",
            "color=\"red\"",
            "★★★★",
            "&lt;b&gt;",
            "Ratings service is currently unavailable",
            "Error fetching product details!",
            "sign out",
        ] {
            assert!(html.contains(part), "{part} is missing");
        }
    }
}
