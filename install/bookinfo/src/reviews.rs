//! `reviews`: v1 without stars, v2 with black ones, v3 with red ones.

use std::time::Duration;

use http::{HeaderMap, Method, StatusCode};
use serde_json::{Value, json};

use crate::{
    client::Client,
    server::{App, Call, Reply, json_reply, not_found},
};

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// v1 (no stars), v2 (black) or v3 (red).
    #[arg(long, env = "SERVICE_VERSION", default_value = "v1")]
    service_version: String,
    /// Where ratings is.
    #[arg(long, env = "RATINGS_URL", default_value = "http://ratings:9080")]
    ratings_url: String,
}

pub(crate) struct Reviews {
    stars: Option<Stars>,
    ratings_url: String,
    client: Client,
}

struct Stars {
    color: &'static str,
    /// Waiting time for ratings; red is less patient, as in the original.
    timeout: Duration,
}

const REVIEWS: [(&str, &str); 2] = [
    (
        "Reviewer1",
        "An extremely entertaining play by Shakespeare. The slapstick humour is refreshing!",
    ),
    (
        "Reviewer2",
        "Absolutely fun and entertaining. The play lacks thematic depth when compared to other plays by Shakespeare.",
    ),
];

impl Reviews {
    pub(crate) fn new(options: Options, client: Client) -> Reviews {
        let stars = match options.service_version.as_str() {
            "v2" => Some(Stars {
                color: "black",
                timeout: Duration::from_secs(10),
            }),
            "v3" => Some(Stars {
                color: "red",
                timeout: Duration::from_millis(2500),
            }),
            _ => None,
        };
        Reviews {
            stars,
            ratings_url: options.ratings_url,
            client,
        }
    }

    /// What to show as the rating of each reviewer; an error object when ratings does not answer.
    async fn rating(&self, stars: &Stars, id: i64, headers: &HeaderMap) -> [Value; 2] {
        let url = format!("{}/ratings/{id}", self.ratings_url);
        let answer = self.client.get(&url, headers, stars.timeout).await;
        let ratings = match &answer {
            Ok((StatusCode::OK, body)) => serde_json::from_slice::<Value>(body).ok(),
            _ => None,
        };
        REVIEWS.map(|(reviewer, _)| {
            match ratings
                .as_ref()
                .and_then(|all| all["ratings"][reviewer].as_i64())
            {
                Some(count) => json!({"stars": count, "color": stars.color}),
                None => json!({"error": "Ratings service is currently unavailable"}),
            }
        })
    }
}

impl App for Reviews {
    async fn answer(&self, call: Call) -> Reply {
        if call.method != Method::GET {
            return not_found();
        }
        if call.path == "/health" {
            return json_reply(StatusCode::OK, &json!({"status": "Reviews is healthy"}));
        }
        let Some(id) = call
            .path
            .strip_prefix("/reviews/")
            .and_then(|id| id.parse::<i64>().ok())
        else {
            return not_found();
        };
        let ratings = match &self.stars {
            Some(stars) => Some(self.rating(stars, id, &call.headers).await),
            None => None,
        };
        let reviews: Vec<Value> = REVIEWS
            .iter()
            .enumerate()
            .map(|(index, (reviewer, text))| {
                let mut review = json!({"reviewer": reviewer, "text": text});
                if let Some(ratings) = &ratings {
                    review["rating"] = ratings[index].clone();
                }
                review
            })
            .collect();
        json_reply(
            StatusCode::OK,
            &json!({"id": id.to_string(), "reviews": reviews}),
        )
    }
}
