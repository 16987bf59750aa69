// Tries the official Go client against a running server; try_openai_go.py builds and runs it with
// several releases of the client, for which it replaces the path of the module.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/openai/openai-go/v3"
	"github.com/openai/openai-go/v3/option"
)

// Tools are set as JSON: their types have other names in every major release.
var tools = []any{map[string]any{"type": "function", "function": map[string]any{
	"name": "Weather", "description": "Tells the weather of a city.",
	"parameters": map[string]any{
		"type":       "object",
		"properties": map[string]any{"city": map[string]any{"enum": []string{"Paris", "Rome"}}},
		"required":   []string{"city"}, "additionalProperties": false}}}}

func params(model string) openai.ChatCompletionNewParams {
	return openai.ChatCompletionNewParams{
		Model:     model,
		MaxTokens: openai.Int(64),
		Messages: []openai.ChatCompletionMessageParamUnion{
			openai.UserMessage("What is the weather in Paris?")}}
}

// Every part of a stream arrives, and together they are an answer with an end.
func collect(client openai.Client, model string, more ...option.RequestOption) (
	openai.ChatCompletionChoice, error) {
	stream := client.Chat.Completions.NewStreaming(context.Background(), params(model), more...)
	parts := openai.ChatCompletionAccumulator{}
	chunks := 0
	for stream.Next() {
		chunks++
		if !parts.AddChunk(stream.Current()) {
			return openai.ChatCompletionChoice{}, errors.New("a chunk does not fit the others")
		}
	}
	if stream.Err() != nil {
		return openai.ChatCompletionChoice{}, stream.Err()
	}
	if chunks < 2 || len(parts.Choices) != 1 || parts.Choices[0].FinishReason == "" {
		return openai.ChatCompletionChoice{}, fmt.Errorf("%d chunks without an end", chunks)
	}
	return parts.Choices[0], nil
}

func checkCall(choice openai.ChatCompletionChoice) error {
	var asked struct{ City string }
	if len(choice.Message.ToolCalls) != 1 {
		return fmt.Errorf("%d calls", len(choice.Message.ToolCalls))
	}
	call := choice.Message.ToolCalls[0].Function
	if err := json.Unmarshal([]byte(call.Arguments), &asked); err != nil {
		return err
	}
	if call.Name != "Weather" || (asked.City != "Paris" && asked.City != "Rome") {
		return fmt.Errorf("%s(%s)", call.Name, call.Arguments)
	}
	return nil
}

func attempt(what string, client openai.Client, model string) error {
	choice := map[string]any{"type": "function", "function": map[string]any{"name": "Weather"}}
	called := []option.RequestOption{
		option.WithJSONSet("tools", tools), option.WithJSONSet("tool_choice", choice)}
	switch what {
	case "chat":
		reply, err := client.Chat.Completions.New(context.Background(), params(model))
		if err == nil && reply.Choices[0].Message.Content == "" {
			err = errors.New("an empty answer")
		}
		return err
	case "stream":
		reply, err := collect(client, model)
		if err == nil && reply.Message.Content == "" {
			err = errors.New("an empty answer")
		}
		return err
	case "call":
		reply, err := client.Chat.Completions.New(context.Background(), params(model), called...)
		if err != nil {
			return err
		}
		return checkCall(reply.Choices[0])
	case "streamed call":
		reply, err := collect(client, model, called...)
		if err != nil {
			return err
		}
		return checkCall(reply)
	case "models":
		_, err := client.Models.Get(context.Background(), model)
		return err
	case "error":
		_, err := client.Chat.Completions.New(context.Background(), params("no such model"))
		var told *openai.Error
		if !errors.As(err, &told) || told.StatusCode != 404 {
			return fmt.Errorf("not a 404 that the client reads: %v", err)
		}
		return nil
	}
	panic(what)
}

func main() {
	client := openai.NewClient(option.WithBaseURL(os.Args[1]), option.WithAPIKey("none"),
		option.WithMaxRetries(0))
	failures := 0
	for _, what := range []string{"chat", "stream", "call", "streamed call", "models", "error"} {
		verdict := "works"
		if err := attempt(what, client, os.Args[2]); err != nil {
			verdict = "FAILS: " + strings.Join(strings.Fields(err.Error()), " ")
			failures++
		}
		fmt.Printf("| %s | %s | %s |\n", os.Args[3], what, verdict)
	}
	os.Exit(failures)
}
