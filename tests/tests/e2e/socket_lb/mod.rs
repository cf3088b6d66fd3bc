//! Virtual service addresses by eBPF: real sockets connect to them, and real endpoints answer.
#![allow(clippy::indexing_slicing, reason = "a test fails by panicking")]

mod changes;
mod lost;
mod outcomes;
mod policies;
mod stage;
mod tcp;
mod udp;

pub(crate) use overlay_tests::cgroup::Cgroup;

use crate::{machine::Need, suite::Suite};

const NEEDS: &[Need] = &[Need::Ebpf, Need::CgroupV2];

pub(crate) fn register(suite: &mut Suite) {
    suite.add("socket_lb::tcp_connections_take_turns", NEEDS, tcp::take_turns);
    suite.add("socket_lb::ipv6_sockets_reach_virtual_addresses", NEEDS, tcp::ipv6_sockets);
    suite.add("socket_lb::without_endpoints_connections_are_refused", NEEDS, tcp::refused);
    suite.add("socket_lb::other_destinations_are_untouched", NEEDS, tcp::untouched);
    suite.add("socket_lb::nothing_is_attached_to_what_is_no_cgroup", NEEDS, tcp::no_cgroup);
    suite.add("socket_lb::connected_udp_sockets_see_the_virtual_address", NEEDS, udp::connected);
    suite.add("socket_lb::unconnected_udp_sockets_keep_an_endpoint", NEEDS, udp::unconnected);
    suite.add("socket_lb::unconnected_udp_sockets_use_many_services", NEEDS, udp::many_services);
    suite.add("socket_lb::many_udp_sockets_do_not_displace_each_other", NEEDS, udp::many_sockets);
    suite.add("socket_lb::affinity_keeps_a_client_until_it_pauses", NEEDS, policies::affinity);
    suite.add("socket_lb::least_connections_count_open_sockets", NEEDS, policies::least_connections);
    suite.add("socket_lb::policies_choose_as_they_say", NEEDS, policies::shares);
    suite.add("socket_lb::turns_are_exact_on_all_cpus", NEEDS, policies::exact_turns);
    suite.add("socket_lb::a_removed_endpoint_gets_no_new_connection", NEEDS, changes::removed_under_load);
    suite.add("socket_lb::no_connection_meets_a_table_in_parts", NEEDS, changes::whole_tables);
    suite.add("socket_lb::the_kernel_has_what_the_catalog_says", NEEDS, changes::read_back);
    suite.add("socket_lb::udp_sockets_of_removed_endpoints_connect_again", NEEDS, lost::connect_again);
    suite.add("socket_lb::outcomes_of_connections_are_counted_exactly", NEEDS, outcomes::exact);
    suite.add("socket_lb::a_silent_endpoint_fails_once_it_had_time", NEEDS, outcomes::silent_endpoint);
    suite.add("socket_lb::a_full_map_takes_whole_tables_only", NEEDS, changes::too_many_slots);
}
