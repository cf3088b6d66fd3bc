//! `overlay-agent datapath`: shows and changes how the running agent moves packets.

use anyhow::Result;
use clap::{Args, Subcommand};

use super::{
    QueryArgs,
    query::{ask, table},
};
use crate::{
    control::Query,
    datapath::Request,
    report::{ActiveRung, Datapath, DatapathRequest},
};

const SET_AFTER_HELP: &str = "\
Examples:
  overlay-agent datapath set tc
  overlay-agent datapath set auto -o json
  overlay-agent datapath set tun --device ovl1

Answers when the change is made, with the rung of each direction and why it is that one. A rung that is not possible is refused, and \
the one before stays. Packets go on meanwhile: new programs are attached before old ones are detached. The setting lasts until the \
agent ends: its next start takes --datapath again. `auto` also attempts again at once what was refused.

Exit codes: 0 the change is made, 1 refused or no agent answers (one line on standard error gives the reason), 2 wrong usage.";

#[derive(Debug, Subcommand)]
pub(super) enum DatapathCommand {
    /// Show the rung that is asked for, those in use, and programs that are left out for a while
    Show(QueryArgs),
    /// Change the rung of the running agent, until it ends
    Set(SetArgs),
}

#[derive(Debug, Args)]
#[command(after_help = SET_AFTER_HELP)]
pub(super) struct SetArgs {
    /// Datapath of both directions
    #[arg(value_name = "RUNG", value_enum)]
    rung: Request,
    #[command(flatten)]
    query: QueryArgs,
}

pub(super) async fn run(command: DatapathCommand) -> Result<()> {
    match command {
        DatapathCommand::Show(args) => ask(&args, Query::Datapath, text).await,
        DatapathCommand::Set(args) => ask(&args.query, Query::SetDatapath(args.rung), text).await,
    }
}

fn text(datapath: &Datapath) -> String {
    let mut table = table();
    let active = |rung: &Option<ActiveRung>| rung.as_ref().map_or_else(|| "down".to_owned(), active);
    table.add_row(["datapath".to_owned(), requested(&datapath.request)]);
    table.add_row(["egress".to_owned(), active(&datapath.egress)]);
    table.add_row(["ingress".to_owned(), active(&datapath.ingress)]);
    table.to_string()
}

/// What was asked for, and what it lacks, in one line.
pub(super) fn requested(request: &DatapathRequest) -> String {
    let DatapathRequest { requested, at_start, postponed } = request;
    let until = match requested == at_start {
        true => String::new(),
        false => format!(" until the agent ends, {at_start} from its next start on"),
    };
    let postponed = postponed.iter().map(|postponed| {
        format!("; without {}: {}; next attempt at {}", postponed.what, postponed.why, postponed.next_attempt)
    });
    format!("{requested}{until}{}", postponed.collect::<String>())
}

/// The rung of one direction in one line.
pub(super) fn active(active: &ActiveRung) -> String {
    let ActiveRung { choice, since } = active;
    let since = since.as_ref().map_or_else(String::new, |since| format!(", since {since}"));
    format!("{} ({}){since}", choice.rung, choice.why)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        datapath::{Choice, Rung},
        report::Postponed,
    };

    #[test]
    fn the_text_says_how_long_a_setting_lasts_and_what_is_left_out() {
        let rung = ActiveRung {
            choice: Choice { rung: Rung::Tun, why: "tun is asked for".to_owned() },
            since: Some("2026-01-02T03:04:05Z".to_owned()),
        };
        let request =
            DatapathRequest { requested: Request::Tun, at_start: Request::Auto, postponed: Vec::new() };
        let shown = text(&Datapath { request, egress: Some(rung), ingress: None });
        for words in [
            "tun until the agent ends, auto from its next start on",
            "tun (tun is asked for), since 2026-01-02T03:04:05Z",
            "down",
        ] {
            assert!(shown.contains(words), "{shown}");
        }
        let postponed = vec![Postponed {
            what: "ovl_xdp on eth0".to_owned(),
            why: "no driver".to_owned(),
            next_attempt: "2026-01-02T03:04:05Z".to_owned(),
        }];
        let line =
            requested(&DatapathRequest { requested: Request::Auto, at_start: Request::Auto, postponed });
        assert_eq!(line, "auto; without ovl_xdp on eth0: no driver; next attempt at 2026-01-02T03:04:05Z");
    }
}
