//! `details`: facts about the book.

use http::{Method, StatusCode};
use serde_json::json;

use crate::server::{App, Call, Reply, json_reply, not_found};

pub(crate) struct Details;

impl App for Details {
    async fn answer(&self, call: Call) -> Reply {
        if call.method != Method::GET {
            return not_found();
        }
        if call.path == "/health" {
            return json_reply(StatusCode::OK, &json!({"status": "Details is healthy"}));
        }
        let Some(id) = call.path.strip_prefix("/details/") else {
            return not_found();
        };
        match id.parse::<i64>() {
            Ok(id) => json_reply(
                StatusCode::OK,
                &json!({
                    "id": id,
                    "author": "William Shakespeare",
                    "year": 1595,
                    "type": "paperback",
                    "pages": 200,
                    "publisher": "PublisherA",
                    "language": "English",
                    "ISBN-10": "1234567890",
                    "ISBN-13": "123-1234567890",
                }),
            ),
            Err(_) => json_reply(
                StatusCode::BAD_REQUEST,
                &json!({"error": "please provide numeric product id"}),
            ),
        }
    }
}
