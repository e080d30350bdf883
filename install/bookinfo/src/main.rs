//! Bookinfo, the sample application of the mesh: `bookinfo productpage|details|reviews|ratings`.
//!
//! Same paths, ports, versions, timeouts and quirks as the original; one program instead of four
//! languages. Listens on `--bind`:`--port` and sends what it asks of others through `HTTP_PROXY`,
//! so that a sidecar can stand in front of it and behind it without privileges.

mod client;
mod details;
mod page;
mod productpage;
mod ratings;
mod reviews;
mod server;

use std::net::{IpAddr, SocketAddr};

use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(version, about = "The Bookinfo sample application")]
struct Cli {
    /// Address to listen on.
    #[arg(long, env = "BIND", default_value = "0.0.0.0", global = true)]
    bind: IpAddr,
    /// Port to listen on.
    #[arg(long, env = "PORT", default_value_t = 9080, global = true)]
    port: u16,
    /// HTTP proxy for everything this service asks of others, e.g. its sidecar.
    #[arg(long, env = "HTTP_PROXY", global = true)]
    http_proxy: Option<String>,
    #[command(subcommand)]
    service: Service,
}

#[derive(Debug, Subcommand)]
enum Service {
    /// The page: calls details and reviews.
    Productpage(productpage::Options),
    /// Facts about the book.
    Details,
    /// Reviews; v2 and v3 ask ratings for stars.
    Reviews(reviews::Options),
    /// Stars by reviewer.
    Ratings(ratings::Options),
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let cli = Cli::parse();
    let address = SocketAddr::new(cli.bind, cli.port);
    let client = client::Client::new(cli.http_proxy.as_deref())?;
    match cli.service {
        Service::Productpage(options) => {
            server::run(address, productpage::Productpage::new(options, client)).await
        }
        Service::Details => server::run(address, details::Details).await,
        Service::Reviews(options) => {
            server::run(address, reviews::Reviews::new(options, client)).await
        }
        Service::Ratings(options) => server::run(address, ratings::Ratings::new(options)).await,
    }
}
