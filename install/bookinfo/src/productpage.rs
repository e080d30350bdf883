//! `productpage`: the page a person sees; calls details once and reviews up to twice.

use std::time::Duration;

use http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use serde_json::{Value, json};

use crate::{
    client::Client,
    page,
    server::{App, Call, Reply, json_reply, not_found, reply},
};

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Where details is.
    #[arg(long, env = "DETAILS_URL", default_value = "http://details:9080")]
    details_url: String,
    /// Where reviews is.
    #[arg(long, env = "REVIEWS_URL", default_value = "http://reviews:9080")]
    reviews_url: String,
    /// Where ratings is (only the API asks it directly).
    #[arg(long, env = "RATINGS_URL", default_value = "http://ratings:9080")]
    ratings_url: String,
    /// How many more times each page calls reviews, to make load.
    #[arg(long, env = "FLOOD_FACTOR", default_value_t = 0)]
    flood_factor: u16,
}

/// Waiting time for each call, as in the original.
const TIMEOUT: Duration = Duration::from_secs(3);

pub(crate) struct Productpage {
    options: Options,
    client: Client,
}

impl Productpage {
    pub(crate) fn new(options: Options, client: Client) -> Productpage {
        Productpage { options, client }
    }

    async fn details(&self, id: i64, headers: &HeaderMap) -> (StatusCode, Value) {
        let url = format!("{}/details/{id}", self.options.details_url);
        self.ask(&url, headers)
            .await
            .unwrap_or_else(|status| (status, unavailable("details")))
    }

    /// Two attempts: the bug that the fault injection task of the documentation finds.
    async fn reviews(&self, id: i64, headers: &HeaderMap) -> (StatusCode, Value) {
        let url = format!("{}/reviews/{id}", self.options.reviews_url);
        let mut last = StatusCode::INTERNAL_SERVER_ERROR;
        for _ in 0..2 {
            match self.ask(&url, headers).await {
                Ok(answer) => return answer,
                Err(status) => last = status,
            }
        }
        (last, unavailable("reviews"))
    }

    async fn ratings(&self, id: i64, headers: &HeaderMap) -> (StatusCode, Value) {
        let url = format!("{}/ratings/{id}", self.options.ratings_url);
        self.ask(&url, headers)
            .await
            .unwrap_or_else(|status| (status, unavailable("ratings")))
    }

    async fn ask(&self, url: &str, headers: &HeaderMap) -> Result<(StatusCode, Value), StatusCode> {
        match self.client.get(url, headers, TIMEOUT).await {
            Ok((StatusCode::OK, body)) => serde_json::from_slice(&body)
                .map(|value| (StatusCode::OK, value))
                .map_err(|_| StatusCode::INTERNAL_SERVER_ERROR),
            Ok((status, _)) => Err(status),
            Err(_) => Err(StatusCode::INTERNAL_SERVER_ERROR),
        }
    }

    async fn page(&self, headers: &HeaderMap, user: Option<&str>) -> Reply {
        if self.options.flood_factor > 0 {
            let url = format!("{}/reviews/0", self.options.reviews_url);
            let calls = (0..self.options.flood_factor).map(|_| self.ask(&url, headers));
            futures::future::join_all(calls).await;
        }
        let ((details_status, details), (reviews_status, reviews)) =
            futures::future::join(self.details(0, headers), self.reviews(0, headers)).await;
        let html = page::product(
            user,
            (details_status == StatusCode::OK)
                .then_some(&details)
                .ok_or(&details),
            (reviews_status == StatusCode::OK)
                .then_some(&reviews)
                .ok_or(&reviews),
        );
        reply(StatusCode::OK, "text/html; charset=utf-8", html)
    }
}

fn unavailable(what: &str) -> Value {
    json!({"error": format!("Sorry, product {what} are currently unavailable for this book.")})
}

impl App for Productpage {
    async fn answer(&self, call: Call) -> Reply {
        let user = session_user(&call.headers);
        let mut headers = call.headers.clone();
        // The header tells the mesh who is logged in; only the session may say so.
        headers.remove("end-user");
        if let Some(value) = user.as_deref().and_then(|u| HeaderValue::from_str(u).ok()) {
            headers.insert("end-user", value);
        }
        match (call.method.clone(), call.path.as_str()) {
            (Method::GET, "/" | "/index.html") => {
                reply(StatusCode::OK, "text/html; charset=utf-8", page::index())
            }
            (Method::GET, "/health") => reply(
                StatusCode::OK,
                "text/plain; charset=utf-8",
                "Product page is healthy",
            ),
            (Method::GET, "/productpage") => self.page(&headers, user.as_deref()).await,
            (Method::POST, "/login") => login(&call.body),
            (Method::GET, "/logout") => redirect(Some("session=; Path=/; Max-Age=0; HttpOnly")),
            (Method::GET, "/api/v1/products") => {
                json_reply(StatusCode::OK, &json!([page::product_facts()]))
            }
            (Method::GET, path) if path.starts_with("/api/v1/products/") => {
                let rest = path.trim_start_matches("/api/v1/products/");
                let (id, what) = rest.split_once('/').unwrap_or((rest, "details"));
                let Ok(id) = id.parse::<i64>() else {
                    return not_found();
                };
                let (status, value) = match what {
                    "details" => self.details(id, &headers).await,
                    "reviews" => self.reviews(id, &headers).await,
                    "ratings" => self.ratings(id, &headers).await,
                    _ => return not_found(),
                };
                json_reply(status, &value)
            }
            _ => not_found(),
        }
    }
}

/// The session cookie is the user's name in the open: this is a sample, its password is whatever you type.
fn session_user(headers: &HeaderMap) -> Option<String> {
    let cookies = headers.get(header::COOKIE)?.to_str().ok()?;
    let session = cookies
        .split(';')
        .find_map(|cookie| cookie.trim().strip_prefix("session="))?;
    let user: String = url::form_urlencoded::parse(format!("u={session}").as_bytes())
        .next()?
        .1
        .into_owned();
    (!user.is_empty()).then_some(user)
}

fn login(form: &[u8]) -> Reply {
    let user = url::form_urlencoded::parse(form)
        .find(|(name, _)| name == "username")
        .map(|(_, value)| value.into_owned())
        .unwrap_or_default();
    let encoded: String = url::form_urlencoded::byte_serialize(user.as_bytes()).collect();
    redirect(Some(&format!("session={encoded}; Path=/; HttpOnly")))
}

fn redirect(cookie: Option<&str>) -> Reply {
    let mut response = reply(StatusCode::FOUND, "text/html; charset=utf-8", "");
    response
        .headers_mut()
        .insert(header::LOCATION, HeaderValue::from_static("/productpage"));
    if let Some(value) = cookie.and_then(|c| HeaderValue::from_str(c).ok()) {
        response.headers_mut().insert(header::SET_COOKIE, value);
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_login_sets_the_session_that_the_next_request_is_known_by() {
        let response = login(b"username=jas%20on&passwd=x");
        let cookie = response.headers()[header::SET_COOKIE].to_str().unwrap();
        let mut headers = HeaderMap::new();
        let sent = format!("a=b; {}", cookie.split(';').next().unwrap());
        headers.insert(header::COOKIE, sent.parse().unwrap());
        assert_eq!(session_user(&headers).as_deref(), Some("jas on"));
    }
}
