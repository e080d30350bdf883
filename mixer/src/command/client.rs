//! `mixer check` and `mixer report`: calls to a running Mixer by hand.

use std::{collections::HashMap, io::Write, time::Instant};

use anyhow::Context as _;
use lateen_adapter::Code;
use lateen_engine::{Bag, wire};
use lateen_protocols::{
    dictionary::GLOBAL_WORDS,
    istio::mixer::v1::{
        CheckRequest, CheckResponse, CompressedAttributes, ReferencedAttributes, ReportRequest,
        check_request::QuotaParams,
        header_operation::Operation,
        mixer_client::MixerClient,
        referenced_attributes::{AttributeMatch, Condition},
        report_request::RepeatedAttributesSemantics,
    },
};
use tonic::{
    Request,
    transport::{Channel, Endpoint},
};

use super::attributes::Attributes;
use crate::{
    explain::Explanation,
    serve::{EXPLAIN, EXPLANATION, GENERATION, KNOWS_GENERATION, VERDICT},
};

/// A running Mixer.
#[derive(Debug, clap::Args)]
pub struct Server {
    /// The API without TLS.
    #[arg(
        long,
        env = "LATEEN_MIXER",
        value_name = "URL",
        default_value = "http://127.0.0.1:9091"
    )]
    pub mixer: String,
}

impl Server {
    async fn connect(&self) -> anyhow::Result<MixerClient<Channel>> {
        let url = if self.mixer.contains("://") {
            self.mixer.clone()
        } else {
            format!("http://{}", self.mixer)
        };
        let channel = Endpoint::from_shared(url)?
            .connect()
            .await
            .with_context(|| format!("cannot reach {}; is Mixer there (--mixer)?", self.mixer))?;
        Ok(MixerClient::new(channel))
    }
}

/// `mixer check`.
#[derive(Debug, clap::Args)]
pub struct CheckOptions {
    /// Whom to ask.
    #[command(flatten)]
    pub server: Server,
    /// The request.
    #[command(flatten)]
    pub attributes: Attributes,
    /// Take quota: NAME or NAME=AMOUNT.
    #[arg(short, long = "quota", value_name = "NAME[=AMOUNT]")]
    pub quota: Vec<String>,
    /// Less quota than was asked for is welcome too.
    #[arg(long)]
    pub best_effort: bool,
    /// Ask why.
    #[arg(long)]
    pub explain: bool,
    /// How often.
    #[arg(long, value_name = "COUNT", default_value_t = 1)]
    pub repeat: u32,
}

/// `mixer report`.
#[derive(Debug, clap::Args)]
pub struct ReportOptions {
    /// Whom to tell.
    #[command(flatten)]
    pub server: Server,
    /// What happened.
    #[command(flatten)]
    pub attributes: Attributes,
    /// How often, all in one call.
    #[arg(long, value_name = "COUNT", default_value_t = 1)]
    pub repeat: u32,
}

fn compress(bag: &Bag) -> CompressedAttributes {
    wire::encode(bag.iter(), GLOBAL_WORDS.len())
}

fn word_count() -> u32 {
    u32::try_from(GLOBAL_WORDS.len()).unwrap_or(u32::MAX)
}

/// The check that a proxy would send.
pub fn request(
    bag: &Bag,
    quotas: HashMap<String, QuotaParams>,
    deduplication_id: String,
) -> CheckRequest {
    CheckRequest {
        attributes: Some(compress(bag)),
        global_word_count: word_count(),
        deduplication_id,
        quotas,
    }
}

/// Asks, and prints the answer.
///
/// # Errors
/// Mixer cannot be reached, or has no answer. A denial is one.
pub async fn check(options: &CheckOptions, out: &mut impl Write) -> anyhow::Result<()> {
    let table = options.attributes.table()?;
    let bag = options.attributes.bag(&table)?;
    let mut quotas = HashMap::new();
    for text in &options.quota {
        let (name, amount) = match text.split_once('=') {
            Some((name, amount)) => (
                name,
                amount.parse().with_context(|| format!("--quota {text}"))?,
            ),
            None => (text.as_str(), 1),
        };
        let params = QuotaParams {
            amount,
            best_effort: options.best_effort,
        };
        quotas.insert(name.to_owned(), params);
    }
    let mut client = options.server.connect().await?;
    let run: u64 = rand::random();
    for i in 0..options.repeat {
        let id = format!("{run:x}-{i}");
        let mut request = Request::new(request(&bag, quotas.clone(), id));
        let metadata = request.metadata_mut();
        metadata.insert(KNOWS_GENERATION, "1".parse()?);
        if options.explain {
            metadata.insert(EXPLAIN, "1".parse()?);
        }
        let begun = Instant::now();
        let response = client.check(request).await?;
        let took = begun.elapsed();
        let text = |name: &str| {
            let value = response.metadata().get(name).and_then(|v| v.to_str().ok());
            value.unwrap_or("-").to_owned()
        };
        let (verdict, generation) = (text(VERDICT), text(GENERATION));
        let explanation = response
            .metadata()
            .get_bin(EXPLANATION)
            .and_then(|json| json.to_bytes().ok())
            .and_then(|json| serde_json::from_slice::<Explanation>(&json).ok());
        show(&response.into_inner(), out)?;
        writeln!(
            out,
            "  verdict     {verdict}, generation {generation}, {took:.1?}"
        )?;
        match explanation {
            Some(explanation) => explain(&explanation, out)?,
            None if options.explain => writeln!(out, "  why         Mixer does not say")?,
            None => {}
        }
    }
    Ok(())
}

fn show(answer: &CheckResponse, out: &mut impl Write) -> anyhow::Result<()> {
    let precondition = answer.precondition.clone().unwrap_or_default();
    let status = precondition.status.unwrap_or_default();
    let code = Code::from_number(i64::from(status.code)).map_or("UNKNOWN", Code::name);
    writeln!(out, "{code} {}", status.message)?;
    let valid = precondition.valid_duration.unwrap_or_default();
    let valid = std::time::Duration::try_from(valid).unwrap_or_default();
    let uses = match precondition.valid_use_count {
        ..0 => "any number of uses".to_owned(),
        count => format!("{count} uses"),
    };
    writeln!(out, "  valid       {valid:?}, {uses}")?;
    let names = referenced(&precondition.referenced_attributes.unwrap_or_default());
    writeln!(out, "  depends on  {}", names.join(", "))?;
    if let Some(directive) = precondition.route_directive {
        if directive.direct_response_code != 0 {
            let code = directive.direct_response_code;
            writeln!(
                out,
                "  response    {code} {}",
                directive.direct_response_body
            )?;
        }
        let sides = [
            ("request", directive.request_header_operations),
            ("response", directive.response_header_operations),
        ];
        for (side, operations) in sides {
            for one in operations {
                let operation = Operation::try_from(one.operation).unwrap_or_default();
                let verb = operation.as_str_name().to_lowercase();
                writeln!(out, "  {side:<10}  {verb} {}: {}", one.name, one.value)?;
            }
        }
    }
    let mut quotas: Vec<_> = answer.quotas.iter().collect();
    quotas.sort_by_key(|(name, _)| *name);
    for (name, quota) in quotas {
        let status = quota.status.clone().unwrap_or_default();
        writeln!(
            out,
            "  quota       {name}: {} granted {}",
            quota.granted_amount, status.message
        )?;
    }
    Ok(())
}

/// What an answer depends on, as `mixer eval` writes it.
fn referenced(attributes: &ReferencedAttributes) -> Vec<String> {
    let word = |index: i32| -> &str {
        let found = match usize::try_from(index) {
            Ok(index) => GLOBAL_WORDS.get(index).copied(),
            Err(_) => {
                let own = usize::try_from(-(i64::from(index) + 1)).unwrap_or(usize::MAX);
                attributes.words.get(own).map(String::as_str)
            }
        };
        found.unwrap_or("?")
    };
    let shown = |one: &AttributeMatch| {
        let mark = if one.condition() == Condition::Absence {
            "-"
        } else {
            ""
        };
        // 0 is a word too, but no key of any map.
        match one.map_key {
            0 => format!("{mark}{}", word(one.name)),
            key => format!("{mark}{}[{}]", word(one.name), word(key)),
        }
    };
    let mut names: Vec<String> = attributes.attribute_matches.iter().map(shown).collect();
    names.sort();
    names
}

/// Prints an explanation.
pub(super) fn explain(why: &Explanation, out: &mut impl Write) -> anyhow::Result<()> {
    writeln!(out, "  why")?;
    for rule in &why.rules {
        let condition = if rule.condition.is_empty() {
            "always".to_owned()
        } else {
            format!("if {}", rule.condition)
        };
        let tried = if rule.dry_run { " (dry run)" } else { "" };
        writeln!(out, "    {} {}{tried}: {condition}", rule.rule, rule.place)?;
        for asked in &rule.asked {
            let who = match asked.handler.as_str() {
                "" => "nobody asked".to_owned(),
                handler => format!("{handler} ({}) given {}", asked.adapter, asked.instance),
            };
            let message = &asked.message;
            writeln!(out, "      {who}: {} {message}", asked.code)?;
        }
    }
    for quota in &why.quotas {
        let by = match quota.rule.as_str() {
            "" => "no rule".to_owned(),
            rule => format!("{rule} {} by {}", quota.place, quota.handler),
        };
        writeln!(
            out,
            "    quota {}: {} of {} by {by} {}",
            quota.quota, quota.granted, quota.asked, quota.message
        )?;
    }
    for (name, value) in &why.attributes {
        writeln!(out, "    {name} = {value}")?;
    }
    if !why.not_applied.is_empty() {
        writeln!(out, "    did not apply: {}", why.not_applied.join(", "))?;
    }
    Ok(())
}

/// Tells what happened.
///
/// # Errors
/// Mixer cannot be reached, or refuses the report.
pub async fn report(options: &ReportOptions, out: &mut impl Write) -> anyhow::Result<()> {
    let table = options.attributes.table()?;
    let bag = options.attributes.bag(&table)?;
    let mut client = options.server.connect().await?;
    let one = compress(&bag);
    let count = usize::try_from(options.repeat).unwrap_or(usize::MAX);
    let begun = Instant::now();
    client
        .report(ReportRequest {
            attributes: std::iter::repeat_n(one, count).collect(),
            default_words: Vec::new(),
            global_word_count: word_count(),
            repeated_attributes_semantics: RepeatedAttributesSemantics::IndependentEncoding.into(),
        })
        .await?;
    writeln!(out, "OK, {count} reported in {:.1?}", begun.elapsed())?;
    Ok(())
}
