//! `proxy iptables`: has the kernel send a workload's traffic through its sidecar, and undoes it.
//!
//! `settings` (flags, read and checked) → `rules` (what the tables shall hold; pure) → `system` (what they hold, and
//! the change from one to the other). Chains, their order and the flags' letters are Istio's, so that who knows
//! one knows the other; everything is in chains of our own, so that taking it out leaves nothing behind.
//!
//! It runs once, as root, before the workload starts (an init container). It is no part of the data path.

mod rules;
mod settings;
mod system;

use clap::{Args, Subcommand};

pub use rules::Family;
pub use settings::{Dns, Intercept, Mode, Owners, Ports, Ranges, Settings};
pub use system::SystemError;

use system::{Backend, System};

/// `proxy iptables …`.
#[derive(Clone, Debug, Subcommand)]
pub enum Command {
    /// Send this network namespace's TCP through the proxy. Doing it again changes nothing.
    Apply(Box<Apply>),
    /// Take out everything that `apply` has put in.
    Clean(Tools),
}

/// How to apply.
#[derive(Clone, Debug, Args)]
pub struct Apply {
    /// What to intercept.
    #[command(flatten)]
    pub intercept: Intercept,
    /// What changes the tables.
    #[command(flatten)]
    pub tools: Tools,
    /// Print what would be given to iptables-restore for empty tables, and change nothing.
    #[arg(short = 'n', long)]
    pub dry_run: bool,
}

/// Which programs change the tables.
#[derive(Clone, Debug, Args)]
pub struct Tools {
    /// Which iptables: the system's own choice, or the one for the kernel's nf_tables or its older tables.
    #[arg(long, value_enum, default_value_t = Backend::Default)]
    pub backend: Backend,
    /// Whether IPv6 too: `auto` if this namespace has an address beyond loopback and link.
    #[arg(long, value_enum, default_value_t = Ipv6::Auto)]
    pub ipv6: Ipv6,
}

/// Whether IPv6 is intercepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Ipv6 {
    /// If there is an address.
    Auto,
    /// In any case.
    On,
    /// Never.
    Off,
}

impl Ipv6 {
    fn families(self, system: &System) -> Vec<Family> {
        let wanted = match self {
            Ipv6::Auto => system.has_ipv6(),
            Ipv6::On => true,
            Ipv6::Off => false,
        };
        match wanted {
            true => vec![Family::V4, Family::V6],
            false => vec![Family::V4],
        }
    }
}

/// Does it; gives what there is to print.
///
/// # Errors
/// A program is missing or refuses: then its words are in the error, and tables it did not get to are as they were.
pub fn run(command: &Command) -> Result<String, SystemError> {
    match command {
        Command::Apply(apply) if apply.dry_run => {
            let settings = apply.intercept.settings();
            let families = match apply.tools.ipv6 {
                Ipv6::Off => &[Family::V4][..],
                Ipv6::Auto | Ipv6::On => &[Family::V4, Family::V6],
            };
            Ok(preview(&settings, families))
        }
        Command::Apply(apply) => {
            let system = System::new(apply.tools.backend);
            let settings = apply.intercept.settings();
            for family in apply.tools.ipv6.families(&system) {
                system.apply(&settings, family)?;
            }
            Ok(String::new())
        }
        Command::Clean(tools) => {
            let system = System::new(tools.backend);
            // An address may have gone since; rules may not stay because of that.
            let families = match tools.ipv6 {
                Ipv6::Off => &[Family::V4][..],
                Ipv6::Auto | Ipv6::On => &[Family::V4, Family::V6],
            };
            for family in families {
                system.clean(*family)?;
            }
            Ok(String::new())
        }
    }
}

/// What `apply` gives to iptables-restore where there is nothing yet, and the commands beside it.
pub fn preview(settings: &Settings, families: &[Family]) -> String {
    let mut text = String::new();
    for family in families {
        let restore = family.program(Backend::Default, "-restore");
        text += &format!("# {restore} --noflush\n");
        for table in rules::tables(settings, *family) {
            text += &table.restore(&Default::default());
        }
        for arguments in rules::ip_commands(settings, *family) {
            text += &format!("# ip {}\n", arguments.join(" "));
        }
    }
    text
}

#[cfg(test)]
mod tests;
