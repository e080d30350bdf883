//! `ratings`: stars by reviewer. Variants `v-faulty`, `v-delayed`, `v-unavailable`, `v-unhealthy`
//! misbehave on purpose.

use std::{
    collections::BTreeMap,
    sync::Mutex,
    time::{Duration, Instant},
};

use http::{Method, StatusCode};
use serde_json::json;

use crate::server::{App, Call, Reply, json_reply, not_found};

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// v1, v-faulty, v-delayed, v-unavailable or v-unhealthy.
    #[arg(long, env = "SERVICE_VERSION", default_value = "v1")]
    service_version: String,
}

/// `v-delayed` waits this long every other request, like the original.
const DELAY: Duration = Duration::from_secs(7);

pub(crate) struct Ratings {
    version: String,
    started: Instant,
    stored: Mutex<State>,
}

#[derive(Default)]
struct State {
    ratings: BTreeMap<i64, BTreeMap<String, i64>>,
    requests: u64,
}

impl Ratings {
    pub(crate) fn new(options: Options) -> Ratings {
        Ratings {
            version: options.service_version,
            started: Instant::now(),
            stored: Mutex::default(),
        }
    }

    /// Whether a variant that goes up and down with this period is down now.
    fn down(&self, period: Duration) -> bool {
        (self.started.elapsed().as_secs() / period.as_secs()) % 2 == 1
    }

    fn healthy(&self) -> bool {
        self.version != "v-unhealthy" || !self.down(Duration::from_secs(15 * 60))
    }
}

impl App for Ratings {
    async fn answer(&self, call: Call) -> Reply {
        if call.path == "/health" {
            return if self.healthy() {
                json_reply(StatusCode::OK, &json!({"status": "Ratings is healthy"}))
            } else {
                json_reply(
                    StatusCode::INTERNAL_SERVER_ERROR,
                    &json!({"status": "Ratings is not healthy"}),
                )
            };
        }
        let Some(id) = call.path.strip_prefix("/ratings/") else {
            return not_found();
        };
        let Ok(id) = id.parse::<i64>() else {
            return json_reply(
                StatusCode::BAD_REQUEST,
                &json!({"error": "please provide numeric product ID"}),
            );
        };
        if call.method == Method::POST {
            return match serde_json::from_slice::<BTreeMap<String, i64>>(&call.body) {
                Ok(ratings) => {
                    let answer = json!({"id": id, "ratings": ratings});
                    let mut state = self.stored.lock().expect("no panic while it is held");
                    // The sample has one book; refuse to be filled up.
                    if state.ratings.len() < 1000 || state.ratings.contains_key(&id) {
                        state.ratings.insert(id, ratings);
                    }
                    json_reply(StatusCode::OK, &answer)
                }
                Err(_) => json_reply(
                    StatusCode::BAD_REQUEST,
                    &json!({"error": "please provide valid ratings JSON"}),
                ),
            };
        }
        if call.method != Method::GET {
            return not_found();
        }
        let (odd, ratings) = {
            let mut state = self.stored.lock().expect("no panic while it is held");
            state.requests += 1;
            let stars = state.ratings.get(&id).cloned();
            (state.requests % 2 == 1, stars)
        };
        let unavailable = || {
            json_reply(
                StatusCode::SERVICE_UNAVAILABLE,
                &json!({"error": "Service unavailable"}),
            )
        };
        match self.version.as_str() {
            "v-faulty" if odd => return unavailable(),
            "v-delayed" if odd => tokio::time::sleep(DELAY).await,
            "v-unavailable" if self.down(Duration::from_secs(60)) => return unavailable(),
            "v-unhealthy" if !self.healthy() => return unavailable(),
            _ => {}
        }
        let ratings = ratings.unwrap_or_else(|| {
            BTreeMap::from([("Reviewer1".to_owned(), 5), ("Reviewer2".to_owned(), 4)])
        });
        json_reply(StatusCode::OK, &json!({"id": id, "ratings": ratings}))
    }
}
